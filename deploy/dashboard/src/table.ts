/**
 * A table that has elements only for the rows in sight, however many rows there are.
 * Rows have one height, that of the first; `rows` is shown in its order.
 */
import { el, OUTSIDE, say } from "./dom";

const SPARE_ROWS = 4;
const PRINT_MAX = 1000;

export interface Column<T> {
  readonly title: string;
  readonly text: (row: T) => string;
  readonly href?: (row: T) => string;
  /** Its links lead to another site. */
  readonly isOutside?: boolean;
  readonly tone?: (row: T) => string;
  readonly isNumber?: boolean;
  /** By what the column sorts; without it, it does not. */
  readonly sort?: (row: T) => string | number;
}

interface Shown {
  readonly tr: HTMLTableRowElement;
  readonly cells: readonly { readonly td: HTMLElement; readonly link: HTMLAnchorElement | null }[];
}

export class VirtualTable<T> {
  readonly element: HTMLElement;
  sorted: { readonly column: Column<T>; readonly down: boolean } | null = null;
  private rows: readonly T[] = [];
  private readonly body = el("tbody");
  private readonly table: HTMLTableElement;
  private readonly above = spacer();
  private readonly below = spacer();
  private readonly pool: Shown[] = [];
  private readonly heads: HTMLTableCellElement[];
  private rowHeight = 0;
  private isPrinting = false;
  private readonly onPrint = (event: Event): void => {
    this.isPrinting = event.type === "beforeprint";
    this.draw();
  };

  constructor(caption: string, private readonly columns: readonly Column<T>[], private readonly changed: () => void) {
    this.heads = columns.map((column) => this.head(column));
    this.body.append(this.above, this.below);
    this.table = el("table", { "aria-label": caption }, el("thead", {}, el("tr", { "aria-rowindex": "1" }, ...this.heads)), this.body);
    this.element = el("div", { class: "scroller", role: "region", tabindex: "0", "aria-label": `${caption}, scrollable` }, this.table);
    this.element.addEventListener("scroll", () => this.draw(), { passive: true });
    addEventListener("beforeprint", this.onPrint);
    addEventListener("afterprint", this.onPrint);
  }

  close(): void {
    removeEventListener("beforeprint", this.onPrint);
    removeEventListener("afterprint", this.onPrint);
  }

  show(rows: readonly T[]): void {
    this.rows = rows;
    this.draw();
  }

  private head(column: Column<T>): HTMLTableCellElement {
    const attributes = { scope: "col", ...(column.isNumber ? { class: "number" } : {}) };
    if (!column.sort) return el("th", attributes, column.title);
    const button = el("button", { type: "button" }, column.title);
    button.addEventListener("click", () => {
      this.sorted = { column, down: this.sorted?.column === column && !this.sorted.down };
      this.heads.forEach((th, at) => {
        if (this.columns[at] === column) th.setAttribute("aria-sort", this.sorted?.down ? "descending" : "ascending");
        else th.removeAttribute("aria-sort");
      });
      this.changed();
    });
    return el("th", attributes, button);
  }

  private draw(): void {
    this.measure();
    const fits = Math.ceil(this.element.clientHeight / this.rowHeight) + 2 * SPARE_ROWS;
    const top = Math.floor(this.element.scrollTop / this.rowHeight) - SPARE_ROWS;
    const first = this.isPrinting ? 0 : Math.max(0, Math.min(top, this.rows.length - fits));
    const last = Math.min(this.rows.length, this.isPrinting ? PRINT_MAX : first + fits);
    this.table.setAttribute("aria-rowcount", String(this.rows.length + 1));
    stretch(this.above, first * this.rowHeight);
    stretch(this.below, this.isPrinting ? 0 : (this.rows.length - last) * this.rowHeight);
    for (let at = this.pool.length; at < last - first; at += 1) this.add();
    this.pool.forEach((shown, at) => {
      const row = this.rows[first + at];
      const isShown = row !== undefined && first + at < last;
      if (shown.tr.hidden === isShown) shown.tr.hidden = !isShown;
      if (isShown) this.fill(shown, row, first + at);
    });
  }

  private fill(shown: Shown, row: T, at: number): void {
    const index = String(at + 2);
    if (shown.tr.getAttribute("aria-rowindex") !== index) shown.tr.setAttribute("aria-rowindex", index);
    this.columns.forEach((column, number) => {
      const cell = shown.cells[number];
      if (!cell) return;
      say(cell.link ?? cell.td, column.text(row));
      if (cell.link && column.href) {
        const href = column.href(row);
        if (!href) cell.link.removeAttribute("href");
        else if (cell.link.getAttribute("href") !== href) cell.link.setAttribute("href", href);
      }
      if (column.tone) {
        const name = column.tone(row);
        if (cell.td.className !== name) cell.td.className = name;
      }
    });
  }

  private add(): void {
    const cells = this.columns.map((column) => {
      const link = column.href ? el("a", column.isOutside ? OUTSIDE : {}) : null;
      return { td: el("td", column.isNumber ? { class: "number" } : {}, ...(link ? [link] : [])), link };
    });
    const tr = el("tr", {}, ...cells.map((cell) => cell.td));
    this.pool.push({ tr, cells });
    this.below.before(tr);
  }

  /** Zoom and font size change the height of a row: it is that of the head's, which is the same. */
  private measure(): void {
    const height = this.heads[0]?.offsetHeight ?? 0;
    this.rowHeight = height || 32;
  }
}

/** In place order of a copy; equal ones keep theirs. */
export function inOrder<T>(rows: readonly T[], by: (row: T) => string | number, down: boolean): T[] {
  const sign = down ? -1 : 1;
  const keyed = rows.map((row) => [by(row), row] as const);
  keyed.sort(([a], [b]) => (a < b ? -sign : a > b ? sign : 0));
  return keyed.map(([, row]) => row);
}

function spacer(): HTMLTableRowElement {
  return el("tr", { class: "space", "aria-hidden": "true" }, el("td"));
}

function stretch(row: HTMLTableRowElement, height: number): void {
  const cell = row.firstElementChild as HTMLElement;
  const wanted = `${height}px`;
  if (cell.style.height !== wanted) cell.style.height = wanted;
}
