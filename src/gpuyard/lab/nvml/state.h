#pragma once

#include <stdbool.h>

/* Bring what is known to what the state file says now. False: the file is no state, or is not there. */
bool state_refresh(void);

/* The value of a key, or NULL. It lasts until the next refresh. */
const char *state_text(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* A path below the node's root: a test's folder plays the node. */
const char *under_root(char *into, int size, const char *path);
