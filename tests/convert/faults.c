/* Lets one operation on files fail, or all from one on: loaded before the C
 * library by tests/convert/faults.rs, which says which in FAULT_AT, and how in
 * FAULT_HOW (an errno; 0: a short transfer) and FAULT_LASTS. FAULT_ONLY names
 * the one kind of operation that counts. At the end the number of operations,
 * and which one failed first, is stored in FAULT_REPORT. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

static atomic_long count;
static _Atomic(const char *) hit;

static long number(const char *name)
{
	const char *text = getenv(name);
	return text ? atol(text) : 0;
}

/* Counts an operation; 1 if it is to fail. */
static int is_due(const char *what)
{
	const char *only = getenv("FAULT_ONLY");
	if (only && strcmp(only, what))
		return 0;
	long at = number("FAULT_AT"), now = atomic_fetch_add(&count, 1) + 1;
	if (at == 0 || now < at || (now > at && !number("FAULT_LASTS")))
		return 0;
	const char *none = NULL;
	atomic_compare_exchange_strong(&hit, &none, what);
	return 1;
}

static int is_file(int fd)
{
	struct stat st;
	return fstat(fd, &st) == 0 && S_ISREG(st.st_mode);
}

#define REAL(type, name, ...) ((type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name))

ssize_t pread64(int fd, void *buf, size_t len, off64_t at)
{
	if (is_file(fd) && is_due("read")) {
		errno = number("FAULT_HOW");
		if (errno)
			return -1;
		len = (len + 1) / 2;
	}
	return REAL(ssize_t, pread64, int, void *, size_t, off64_t)(fd, buf, len, at);
}

ssize_t pwrite64(int fd, const void *buf, size_t len, off64_t at)
{
	if (is_file(fd) && is_due("write")) {
		errno = number("FAULT_HOW");
		if (errno)
			return -1;
		len = (len + 1) / 2;
	}
	return REAL(ssize_t, pwrite64, int, const void *, size_t, off64_t)(fd, buf, len, at);
}

/* What cannot be short succeeds then. */
#define FAIL(what)                                  \
	if (number("FAULT_HOW") && is_due(what)) {  \
		errno = number("FAULT_HOW");        \
		return -1;                          \
	}

int fdatasync(int fd)
{
	FAIL("sync");
	return REAL(int, fdatasync, int)(fd);
}

int fsync(int fd)
{
	FAIL("fsync");
	return REAL(int, fsync, int)(fd);
}

int fallocate64(int fd, int mode, off64_t at, off64_t len)
{
	FAIL("fallocate");
	return REAL(int, fallocate64, int, int, off64_t, off64_t)(fd, mode, at, len);
}

int ftruncate64(int fd, off64_t len)
{
	FAIL("truncate");
	return REAL(int, ftruncate64, int, off64_t)(fd, len);
}

int rename(const char *from, const char *to)
{
	FAIL("rename");
	return REAL(int, rename, const char *, const char *)(from, to);
}

__attribute__((destructor)) static void report(void)
{
	const char *path = getenv("FAULT_REPORT");
	FILE *file = path ? fopen(path, "w") : NULL;
	if (!file)
		return;
	const char *what = atomic_load(&hit);
	fprintf(file, "%ld %s\n", (long)atomic_load(&count), what ? what : "none");
	fclose(file);
}
