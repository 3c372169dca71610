// Just enough JSON for the agent's requests, shared by both guests; needs no C library.
//
// A request is "Name" or {"Name":body}, as serde writes an externally tagged enum.
#ifndef JSON_H
#define JSON_H

static inline const char *json_skip_blanks(const char *at)
{
    while (*at == ' ' || *at == '\t' || *at == '\n' || *at == '\r')
        at++;
    return at;
}

// The text after `word` where `at` begins with it, else 0.
static inline const char *json_after(const char *at, const char *word)
{
    while (*word)
        if (*at++ != *word++)
            return 0;
    return at;
}

// The body of a request of that name ("" for none), or 0 if it is another one or malformed.
static inline const char *json_body(const char *request, const char *name)
{
    const char *at = json_skip_blanks(request);
    int map = *at == '{';
    if (map)
        at = json_skip_blanks(at + 1);
    if (*at != '"' || !(at = json_after(at + 1, name)) || *at != '"')
        return 0;
    at = json_skip_blanks(at + 1);
    if (!map)
        return *at ? 0 : "";
    return *at == ':' ? json_skip_blanks(at + 1) : 0;
}

// The first character of the value of the first field of that name, or 0.
static inline const char *json_field(const char *body, const char *key)
{
    for (; *body; body++) {
        const char *after = *body == '"' ? json_after(body + 1, key) : 0;
        if (!after || *after != '"')
            continue;
        after = json_skip_blanks(after + 1);
        if (*after == ':')
            return json_skip_blanks(after + 1);
    }
    return 0;
}

#endif
