/* SPDX-License-Identifier: GPL-3.0-or-later
 * Copyright: vmkeeper.libvirt contributors
 *
 * labwriter TARGET DIRECTORY [sync]
 *
 * Appends 50 records a second to DIRECTORY/writer.log, on an absolute clock. Each record carries its own
 * count (no hole allowed) and the tick of the guest's common monotonic clock (two writers that stop at one
 * instant stop at one tick). It never gives up and never hides a failure: a failed write is noted in
 * /run/writer-TARGET.errors and the same record is tried again.
 *
 * A record is RECORD bytes, ending in a newline; the CRC-32 covers what stands before it:
 * "L1 <target:12> <boot:8> <count:10> <tick:12> <monotonic ns:18> <gap ns:15> <crc:8>"
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define RECORD 96
#define TICK_NS 20000000ULL
#define KEPT_GAPS 16

struct gap {
    uint64_t ns, count, tick;
};

static volatile sig_atomic_t asked_to_stop;

static void stop(int signal_number) { (void)signal_number; asked_to_stop = 1; }

static uint32_t crc32(const char *data, size_t length)
{
    uint32_t crc = 0xffffffff;
    for (size_t i = 0; i < length; i++) {
        crc ^= (unsigned char)data[i];
        for (int bit = 0; bit < 8; bit++)
            crc = (crc >> 1) ^ (0xedb88320 & -(crc & 1));
    }
    return ~crc;
}

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000ULL + now.tv_nsec;
}

/* The count of the last whole record; what follows it (a record torn by a power cut) is cut off. */
static uint64_t last_count(int log, const char *target)
{
    struct stat status;
    char record[RECORD + 1], name[13];
    unsigned long long count;
    unsigned int crc;
    if (fstat(log, &status) != 0)
        return 0;
    for (off_t records = status.st_size / RECORD; records > 0; records--) {
        if (pread(log, record, RECORD, (records - 1) * RECORD) != RECORD)
            continue;
        record[RECORD] = 0;
        if (sscanf(record, "L1 %12s %*8s %llu", name, &count) == 2 && !strcmp(name, target)
            && sscanf(record + RECORD - 9, "%8x", &crc) == 1 && crc == crc32(record, RECORD - 10)) {
            if (records * RECORD != status.st_size && ftruncate(log, records * RECORD) != 0)
                perror("labwriter: ftruncate");
            return count;
        }
    }
    if (status.st_size != 0 && ftruncate(log, 0) != 0)
        perror("labwriter: ftruncate");
    return 0;
}

static void note_error(const char *target, const char *what, uint64_t count, int error)
{
    char path[64];
    snprintf(path, sizeof path, "/run/writer-%s.errors", target);
    FILE *file = fopen(path, "a");
    if (file) {
        fprintf(file, "%s count=%" PRIu64 " monotonic_ns=%" PRIu64 " %s\n", what, count, now_ns(), strerror(error));
        fclose(file);
    }
}

/* The largest gaps and the last completed record, in tmpfs: readable whatever the disk does. */
static void publish(const char *target, const struct gap *gaps, uint64_t count, uint64_t tick, uint64_t when)
{
    char path[64], temporary[72];
    snprintf(path, sizeof path, "/run/writer-%s.gaps", target);
    snprintf(temporary, sizeof temporary, "%s.new", path);
    FILE *file = fopen(temporary, "w");
    if (!file)
        return;
    fprintf(file, "last count=%" PRIu64 " tick=%" PRIu64 " monotonic_ns=%" PRIu64 "\n", count, tick, when);
    for (int i = 0; i < KEPT_GAPS && gaps[i].ns; i++)
        fprintf(file, "gap ns=%" PRIu64 " count=%" PRIu64 " tick=%" PRIu64 "\n", gaps[i].ns, gaps[i].count, gaps[i].tick);
    if (fclose(file) == 0)
        rename(temporary, path);
}

static void keep_gap(struct gap *gaps, struct gap new)
{
    for (int i = 0; i < KEPT_GAPS; i++)
        if (new.ns > gaps[i].ns) {
            memmove(gaps + i + 1, gaps + i, (KEPT_GAPS - i - 1) * sizeof *gaps);
            gaps[i] = new;
            return;
        }
}

static void read_boot_id(char *boot)
{
    int fd = open("/proc/sys/kernel/random/boot_id", O_RDONLY);
    memset(boot, '0', 8);
    if (fd >= 0 && read(fd, boot, 8) != 8)
        memset(boot, '0', 8);
    boot[8] = 0;
    if (fd >= 0)
        close(fd);
}

int main(int argc, char **argv)
{
    if (argc < 3) {
        fprintf(stderr, "usage: labwriter TARGET DIRECTORY [sync]\n");
        return 2;
    }
    const char *target = argv[1];
    int synced = argc > 3 && !strcmp(argv[3], "sync");
    char path[256], boot[9], record[RECORD + 32];
    struct gap gaps[KEPT_GAPS] = {{0, 0, 0}};
    struct sigaction action = {.sa_handler = stop};
    sigaction(SIGTERM, &action, NULL);
    read_boot_id(boot);
    snprintf(path, sizeof path, "%s/writer.log", argv[2]);

    int log;
    while ((log = open(path, O_RDWR | O_CREAT, 0644)) < 0) {
        note_error(target, "open", 0, errno);
        sleep(1);
    }
    uint64_t count = last_count(log, target) + 1;
    off_t end = lseek(log, 0, SEEK_END);
    uint64_t completed = now_ns();
    while (!asked_to_stop) {
        uint64_t next = (now_ns() / TICK_NS + 1) * TICK_NS;
        struct timespec wake = {.tv_sec = next / 1000000000ULL, .tv_nsec = next % 1000000000ULL};
        clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &wake, NULL);
        uint64_t began = now_ns();
        if (began < next) /* an emulated timer can be early */
            continue;
        uint64_t tick = began / TICK_NS;
        int length = snprintf(record, sizeof record,
                              "L1 %-12.12s %s %010" PRIu64 " %012" PRIu64 " %018" PRIu64 " %015" PRIu64, target, boot,
                              count, tick, began, began - completed);
        memset(record + length, ' ', RECORD - 10 - length);
        snprintf(record + RECORD - 10, 11, " %08x\n", crc32(record, RECORD - 10));
        ssize_t written = pwrite(log, record, RECORD, end);
        if (written != RECORD) {
            note_error(target, "write", count, written < 0 ? errno : ENOSPC);
            continue;
        }
        if (synced && fdatasync(log) != 0) {
            note_error(target, "fdatasync", count, errno);
            continue;
        }
        uint64_t done = now_ns();
        keep_gap(gaps, (struct gap){done - completed, count, tick});
        publish(target, gaps, count, tick, done);
        completed = done;
        end += RECORD;
        count++;
    }
    fsync(log);
    return 0;
}
