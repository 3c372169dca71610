/** Questions that are asked again while their answer is shown. */
const EVERY_MS = 5000;

/** Calls `ask` now, and 5 s after each answer, until it resolves to true or the returned function is called. */
export function repeat(ask: () => Promise<boolean>): () => void {
  let isClosed = false;
  const again = async (): Promise<void> => {
    while (!isClosed && !(await ask())) await new Promise((resolve) => setTimeout(resolve, EVERY_MS));
  };
  void again();
  return () => {
    isClosed = true;
  };
}
