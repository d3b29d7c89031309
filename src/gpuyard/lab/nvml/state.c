/* The state of a node's GPUs, from the file that `simulated_gpu.py apply` writes: one `key=value` a line, sorted, between
 * a first and a last line that say it is whole. */
#include "state.h"

#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

typedef struct { char *key, *value; } Line;

static Line *lines;
static size_t count;
static char *text;
static struct stat seen;

const char *under_root(char *into, int size, const char *path)
{
    const char *root = getenv("GPUYARD_LAB_ROOT");
    snprintf(into, size, "%s/%s", root ? root : "", path);
    return into;
}

static void forget(void)
{
    free(lines);
    free(text);
    lines = NULL;
    text = NULL;
    count = 0;
    memset(&seen, 0, sizeof seen);
}

/* Cut the text into lines, in place. */
static bool parse(void)
{
    char *rest = text, *line = strsep(&rest, "\n");
    size_t room = 0;
    if (!line || strcmp(line, "gpuyard-gpus 1") != 0)
        return false;
    while ((line = strsep(&rest, "\n")) && strcmp(line, "end") != 0) {
        char *equals = strchr(line, '=');
        if (!equals)
            return false;
        *equals = 0;
        if (count && strcmp(lines[count - 1].key, line) >= 0)
            return false;
        if (count == room) {
            Line *more = realloc(lines, (room = room ? 2 * room : 256) * sizeof *more);
            if (!more)
                return false;
            lines = more;
        }
        lines[count++] = (Line){line, equals + 1};
    }
    return line && count;
}

bool state_refresh(void)
{
    char path[4096];
    struct stat now;
    int file = open(under_root(path, sizeof path, "run/gpuyard-lab/gpus.state"), O_RDONLY | O_CLOEXEC);
    if (file < 0 || fstat(file, &now) != 0 || now.st_size > 1 << 24) {
        if (file >= 0)
            close(file);
        forget();
        return false;
    }
    if (lines && now.st_ino == seen.st_ino && now.st_size == seen.st_size &&
        memcmp(&now.st_mtim, &seen.st_mtim, sizeof now.st_mtim) == 0) {
        close(file);
        return true;
    }
    forget();
    text = malloc(now.st_size + 1);
    bool whole = text && read(file, text, now.st_size) == now.st_size && !memchr(text, 0, now.st_size);
    close(file);
    if (whole) {
        text[now.st_size] = 0;
        whole = parse();
    }
    if (!whole) {
        forget();
        return false;
    }
    seen = now;
    return true;
}

static int by_key(const void *one, const void *other)
{
    return strcmp(((const Line *)one)->key, ((const Line *)other)->key);
}

const char *state_text(const char *format, ...)
{
    char key[256];
    va_list words;
    va_start(words, format);
    vsnprintf(key, sizeof key, format, words);
    va_end(words);
    Line wanted = {key, NULL};
    Line *found = lines ? bsearch(&wanted, lines, count, sizeof *lines, by_key) : NULL;
    return found ? found->value : NULL;
}
