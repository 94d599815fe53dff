/* Preloaded into a command, lets its disk and its clock fail.

FAULT_PATH: files whose path holds this text take FAULT_BYTES bytes between them; each write after that fails with the errno
FAULT_ERRNO. FAULT_CLOCK: the wall clock jumps to and fro by so many seconds at each reading. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static atomic_long written, readings;

static int fails(int fd, size_t count) {
  const char *want = getenv("FAULT_PATH");
  if (!want) return 0;
  char link[64], path[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return 0;
  path[length] = 0;
  if (!strstr(path, want)) return 0;
  if (atomic_fetch_add(&written, (long)count) + (long)count <= atol(getenv("FAULT_BYTES"))) return 0;
  errno = atoi(getenv("FAULT_ERRNO"));
  return 1;
}

static size_t total(const struct iovec *parts, int n) {
  size_t sum = 0;
  for (int i = 0; i < n; i++) sum += parts[i].iov_len;
  return sum;
}

ssize_t write(int fd, const void *data, size_t count) { return fails(fd, count) ? -1 : syscall(SYS_write, fd, data, count); }

ssize_t writev(int fd, const struct iovec *parts, int n) {
  return fails(fd, total(parts, n)) ? -1 : syscall(SYS_writev, fd, parts, n);
}

ssize_t pwrite(int fd, const void *data, size_t count, off_t at) {
  return fails(fd, count) ? -1 : syscall(SYS_pwrite64, fd, data, count, at);
}

ssize_t pwrite64(int fd, const void *data, size_t count, off_t at) { return pwrite(fd, data, count, at); }

static long jump(void) {
  const char *seconds = getenv("FAULT_CLOCK");
  return !seconds ? 0 : atomic_fetch_add(&readings, 1) % 2 ? atol(seconds) : -atol(seconds);
}

int clock_gettime(clockid_t clock, struct timespec *now) {
  int result = (int)syscall(SYS_clock_gettime, clock, now);
  if (!result && clock == CLOCK_REALTIME) now->tv_sec += jump();
  return result;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
  int result = (int)syscall(SYS_gettimeofday, now, zone);
  if (!result) now->tv_sec += jump();
  return result;
}

time_t time(time_t *at) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (at) *at = now.tv_sec;
  return now.tv_sec;
}
