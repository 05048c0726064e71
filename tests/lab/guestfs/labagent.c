/* SPDX-License-Identifier: GPL-3.0-or-later
 * Copyright: vmkeeper.libvirt contributors
 *
 * labagent PORT MODE
 *
 * A guest agent that misbehaves on purpose. It speaks enough of the QEMU guest agent's protocol for libvirt
 * to call it connected, really freezes the file systems below /disk (FIFREEZE), and then, by MODE:
 *
 *   normal            behaves
 *   hang              reads, never answers anything
 *   hang-freeze       answers until fsfreeze-freeze comes, then never again; nothing is frozen
 *   freeze-no-reply   freezes, never answers that one command, answers later ones
 *   freeze-then-dead  freezes, then never answers anything
 *   late:N            answers fsfreeze-freeze N seconds late (frozen at once)
 *   late-all:N        answers every command but the syncs N seconds late
 *   garbage           answers everything but the syncs with what is not JSON
 *   huge              answers everything but the syncs with 64 MiB of JSON
 *   thaw-fails:N      the first N thaws fail with an error and thaw nothing
 *   freeze-fails      freezes one file system, then says that it failed
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#define LINE 65536

static int port;
static int frozen;

static void say(const char *text)
{
    size_t left = strlen(text);
    while (left) {
        ssize_t done = write(port, text, left);
        if (done < 0) {
            usleep(100000);
            continue;
        }
        text += done;
        left -= done;
    }
}

/* Freezes or thaws every file system mounted below /disk, at most `limit`; the number done. */
static int each_filesystem(unsigned long request, int limit)
{
    DIR *directory = opendir("/disk");
    struct dirent *entry;
    int done = 0;
    while (directory && done < limit && (entry = readdir(directory))) {
        char path[300];
        if (entry->d_name[0] == '.')
            continue;
        snprintf(path, sizeof path, "/disk/%s", entry->d_name);
        int fd = open(path, O_RDONLY | O_DIRECTORY);
        if (fd >= 0 && ioctl(fd, request, 0) == 0)
            done++;
        if (fd >= 0)
            close(fd);
    }
    if (directory)
        closedir(directory);
    return done;
}

static void forever(void)
{
    for (;;)
        pause();
}

static void fill(void)
{
    static char block[1 << 20];
    memset(block, 'x', sizeof block - 1);
    say("{\"return\": \"");
    for (int i = 0; i < 64; i++)
        say(block);
    say("\"}\n");
}

static void answer_number(long number)
{
    char text[64];
    snprintf(text, sizeof text, "{\"return\": %ld}\n", number);
    say(text);
}

static void answer_error(const char *what)
{
    char text[200];
    snprintf(text, sizeof text, "{\"error\": {\"class\": \"GenericError\", \"desc\": \"%s\"}}\n", what);
    say(text);
}

static int is_mode(const char *mode, const char *name, int *number)
{
    size_t length = strlen(name);
    if (strncmp(mode, name, length) || (mode[length] && mode[length] != ':'))
        return 0;
    if (number && mode[length] == ':')
        *number = atoi(mode + length + 1);
    return 1;
}

static void freeze(const char *mode)
{
    int seconds = 0;
    if (is_mode(mode, "hang-freeze", NULL))
        forever();
    if (is_mode(mode, "freeze-fails", NULL)) {
        each_filesystem(FIFREEZE, 1);
        frozen = 1;
        answer_error("failed to freeze a file system");
        return;
    }
    int done = each_filesystem(FIFREEZE, 1000);
    frozen = 1;
    if (is_mode(mode, "freeze-then-dead", NULL))
        forever();
    if (is_mode(mode, "freeze-no-reply", NULL))
        return;
    if (is_mode(mode, "late", &seconds))
        sleep(seconds);
    answer_number(done);
}

static void thaw(const char *mode)
{
    static int refused;
    int refusals = 0;
    if (is_mode(mode, "thaw-fails", &refusals) && refused < refusals) {
        refused++;
        answer_error("failed to thaw a file system");
        return;
    }
    int done = each_filesystem(FITHAW, 1000);
    frozen = 0;
    answer_number(done);
}

static void handle(const char *line, const char *mode)
{
    const char *execute = strstr(line, "\"execute\"");
    char command[64] = "";
    int seconds = 0;
    if (!execute || sscanf(execute + 9, " : \"%63[^\"]\"", command) != 1)
        return;
    fprintf(stderr, "labagent: %s\n", command);
    if (is_mode(mode, "hang", NULL))
        return;
    if (!strncmp(command, "guest-sync", 10)) {
        const char *id = strstr(line, "\"id\"");
        long number = 0;
        if (id)
            sscanf(id + 4, " : %ld", &number);
        if (!strcmp(command, "guest-sync-delimited"))
            say("\xff");
        answer_number(number);
        return;
    }
    if (is_mode(mode, "late-all", &seconds))
        sleep(seconds);
    if (is_mode(mode, "garbage", NULL)) {
        say("\x01\x02 }{ not json \"\"[\n");
    } else if (is_mode(mode, "huge", NULL)) {
        fill();
    } else if (!strcmp(command, "guest-fsfreeze-freeze") || !strcmp(command, "guest-fsfreeze-freeze-list")) {
        freeze(mode);
    } else if (!strcmp(command, "guest-fsfreeze-thaw")) {
        thaw(mode);
    } else if (!strcmp(command, "guest-fsfreeze-status")) {
        say(frozen ? "{\"return\": \"frozen\"}\n" : "{\"return\": \"thawed\"}\n");
    } else if (!strcmp(command, "guest-ping")) {
        say("{\"return\": {}}\n");
    } else if (!strcmp(command, "guest-info")) {
        say("{\"return\": {\"version\": \"7.2\", \"supported_commands\": ["
            "{\"name\": \"guest-ping\", \"enabled\": true, \"success-response\": true},"
            "{\"name\": \"guest-info\", \"enabled\": true, \"success-response\": true},"
            "{\"name\": \"guest-sync\", \"enabled\": true, \"success-response\": true},"
            "{\"name\": \"guest-fsfreeze-status\", \"enabled\": true, \"success-response\": true},"
            "{\"name\": \"guest-fsfreeze-freeze\", \"enabled\": true, \"success-response\": true},"
            "{\"name\": \"guest-fsfreeze-freeze-list\", \"enabled\": true, \"success-response\": true},"
            "{\"name\": \"guest-fsfreeze-thaw\", \"enabled\": true, \"success-response\": true}]}}\n");
    } else {
        char text[200];
        snprintf(text, sizeof text,
                 "{\"error\": {\"class\": \"CommandNotFound\", \"desc\": \"The command %s has not been found\"}}\n", command);
        say(text);
    }
}

int main(int argc, char **argv)
{
    static char line[LINE];
    size_t used = 0;
    if (argc != 3) {
        fprintf(stderr, "usage: labagent PORT MODE\n");
        return 2;
    }
    while ((port = open(argv[1], O_RDWR)) < 0)
        sleep(1);
    for (;;) {
        ssize_t got = read(port, line + used, 1);
        if (got <= 0) { /* the host side is not connected */
            usleep(50000);
            continue;
        }
        if ((unsigned char)line[used] == 0xff) { /* a sync's delimiter starts a message afresh */
            used = 0;
            continue;
        }
        if (line[used] == '\n') {
            line[used] = 0;
            handle(line, argv[2]);
            used = 0;
        } else if (used < LINE - 2) {
            used++;
        }
    }
}
