// Copying, and just enough text for the command line and the agent's answers.
#include "mini.h"

void copy(void *to, const void *from, u64 size)
{
    u8 *t = to;
    const u8 *f = from;
    for (; size >= 8; size -= 8, t += 8, f += 8)
        *(volatile u64 *)t = *(const u64 *)f;
    while (size--)
        *(volatile u8 *)t++ = *f++;
}

bool same(const void *a, const void *b, u64 size)
{
    const u8 *x = a, *y = b;
    for (; size; size--)
        if (*x++ != *y++)
            return false;
    return true;
}

u64 length_of(const char *text)
{
    u64 n = 0;
    while (text[n])
        n++;
    return n;
}

void add(struct text *to, const char *text)
{
    while (*text && to->length < sizeof to->data)
        to->data[to->length++] = *text++;
}

void add_number(struct text *to, u64 value)
{
    char digits[24];
    u32 at = sizeof digits - 1;
    digits[at] = 0;
    do
        digits[--at] = '0' + value % 10;
    while (value /= 10);
    add(to, digits + at);
}

void add_hex(struct text *to, u64 value)
{
    char digits[17];
    for (u32 i = 0; i < 16; i++)
        digits[i] = "0123456789abcdef"[value >> (60 - 4 * i) & 15];
    digits[16] = 0;
    add(to, digits);
}

u64 number(const char **at, u32 base)
{
    u64 value = 0;
    for (;; (*at)++) {
        u32 c = **at, digit = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : 99;
        if (digit >= base)
            return value;
        value = value * base + digit;
    }
}

bool begins(const char *text, const char *prefix)
{
    while (*prefix)
        if (*text++ != *prefix++)
            return false;
    return true;
}

bool value_is(const char *value, const char *word)
{
    if (!begins(value, word))
        return false;
    char end = value[length_of(word)];
    return end == 0 || end == ':';
}
