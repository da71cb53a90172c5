/* What is done for every page, in bulk: hashes, zero detection, bitmaps of the kernel's regions.
 *
 * scan(), without the GIL: for every page of the given ranges, its hash into a table and whether it
 * is all zero into a flag array, in one pass over memory. migrate/codec.py holds the same
 * computation in numpy, for hosts where this file was not compiled; a test holds the two equal.
 *
 * The hash is NH (Black, Halevi, Krawczyk, Krovetz, Rogaway: "UMAC: Fast and Secure Message
 * Authentication", CRYPTO 1999): the sum modulo 2^64 of (lo + k_lo) * (hi + k_hi) over the
 * 64-bit words of the page, halves added modulo 2^32, keyed by the session. The hash of the zero
 * page is subtracted, so that a table of zeros describes untouched memory.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

enum { PAGE_SIZE = 4096, WORDS = PAGE_SIZE / 8, PREFETCH_BYTES = 1024 };

static uint64_t nh_page_portable(const uint64_t *restrict page, const uint64_t *restrict key,
                                 uint64_t *restrict any)
{
    uint64_t sum = 0, seen = 0;
    for (int i = 0; i < WORDS; i++) {
        uint64_t w = page[i], k = key[i];
        uint64_t lo = (uint32_t)((uint32_t)w + (uint32_t)k);
        uint64_t hi = (uint32_t)((uint32_t)(w >> 32) + (uint32_t)(k >> 32));
        sum += lo * hi;
        seen |= w;
    }
    *any = seen;
    return sum;
}

#if defined(__x86_64__)
#include <immintrin.h>

/* Four independent sums hide the latency of the multiplier; memory then sets the pace. */
__attribute__((target("avx2"))) static uint64_t
nh_page_avx2(const uint64_t *restrict page, const uint64_t *restrict key, uint64_t *restrict any)
{
    const __m256i *words = (const __m256i *)page, *keys = (const __m256i *)key;
    __m256i sum[4], seen[4];
    for (int lane = 0; lane < 4; lane++)
        sum[lane] = seen[lane] = _mm256_setzero_si256();
    for (int i = 0; i < WORDS / 4; i += 4) {
        /* The hardware's prefetcher stops at the end of a page; some 15% where memory sets the pace. */
        _mm_prefetch((const char *)(words + i) + PREFETCH_BYTES, _MM_HINT_T0);
        _mm_prefetch((const char *)(words + i) + PREFETCH_BYTES + 64, _MM_HINT_T0);
        for (int lane = 0; lane < 4; lane++) {
            __m256i w = _mm256_loadu_si256(words + i + lane);
            __m256i s = _mm256_add_epi32(w, _mm256_loadu_si256(keys + i + lane));
            sum[lane] = _mm256_add_epi64(sum[lane], _mm256_mul_epu32(s, _mm256_srli_epi64(s, 32)));
            seen[lane] = _mm256_or_si256(seen[lane], w);
        }
    }
    uint64_t out[4];
    _mm256_storeu_si256((__m256i *)out, _mm256_add_epi64(_mm256_add_epi64(sum[0], sum[1]),
                                                         _mm256_add_epi64(sum[2], sum[3])));
    __m256i all = _mm256_or_si256(_mm256_or_si256(seen[0], seen[1]),
                                  _mm256_or_si256(seen[2], seen[3]));
    *any = !_mm256_testz_si256(all, all);
    return out[0] + out[1] + out[2] + out[3];
}
#endif

typedef uint64_t (*nh_page_fn)(const uint64_t *, const uint64_t *, uint64_t *);

static nh_page_fn nh_page = nh_page_portable;

PyDoc_STRVAR(scan_doc,
"scan(memory, ranges, key, table, zero) -> int\n"
"\n"
"memory: buffer of whole pages. ranges: int64 (k, 2), rows [first, end) in pages. key: uint64\n"
"(513,), the last the hash of a zero page. table: uint64, one a page of memory, written at the\n"
"pages of the ranges. zero: uint8, one a page of the ranges in their order. Returns how many\n"
"pages were zero. Raises ValueError for a range outside of memory.");

static PyObject *scan(PyObject *self, PyObject *args)
{
    (void)self;
    Py_buffer memory, ranges, key, table, zero;
    if (!PyArg_ParseTuple(args, "y*y*y*w*w*", &memory, &ranges, &key, &table, &zero))
        return NULL;
    const int64_t pages = memory.len / PAGE_SIZE;
    const int64_t count = ranges.len / 16;
    const int64_t *range = ranges.buf;
    int64_t total = 0, zeros = 0;
    const char *wrong = NULL;
    for (int64_t i = 0; i < count && wrong == NULL; i++) {
        int64_t first = range[2 * i], end = range[2 * i + 1];
        if (first < 0 || end < first || end > pages)
            wrong = "a range lies outside of the memory";
        else
            total += end - first;
    }
    if (wrong == NULL && (key.len != (WORDS + 1) * 8 || table.len < pages * 8 || zero.len < total))
        wrong = "key, table or zero is too short";
    if (wrong == NULL) {
        Py_BEGIN_ALLOW_THREADS
        const uint64_t *keys = key.buf;
        uint64_t *hashes = table.buf;
        uint8_t *flag = zero.buf;
        for (int64_t i = 0; i < count; i++) {
            for (int64_t page = range[2 * i]; page < range[2 * i + 1]; page++) {
                uint64_t any;
                const uint64_t *words = (const uint64_t *)((const char *)memory.buf + page * PAGE_SIZE);
                uint64_t hash = nh_page(words, keys, &any);
                hashes[page] = hash - keys[WORDS];
                *flag = any == 0;
                zeros += *flag++;
            }
        }
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&memory);
    PyBuffer_Release(&ranges);
    PyBuffer_Release(&key);
    PyBuffer_Release(&table);
    PyBuffer_Release(&zero);
    if (wrong != NULL) {
        PyErr_SetString(PyExc_ValueError, wrong);
        return NULL;
    }
    return PyLong_FromLongLong(zeros);
}

PyDoc_STRVAR(or_regions_doc,
"or_regions(regions, count, start, bitmap)\n"
"\n"
"Set the pages of the first `count` regions of PAGEMAP_SCAN (struct page_region: start, end,\n"
"categories) in a bitmap whose bit 0 is the page at address `start`. Raises ValueError for a\n"
"region outside of the bitmap.");

static PyObject *or_regions(PyObject *self, PyObject *args)
{
    (void)self;
    Py_buffer regions, bitmap;
    Py_ssize_t count;
    unsigned long long start;
    if (!PyArg_ParseTuple(args, "y*nKw*", &regions, &count, &start, &bitmap))
        return NULL;
    const uint64_t *region = regions.buf;
    uint64_t *words = bitmap.buf;
    const uint64_t pages = (uint64_t)bitmap.len * 8;
    int outside = count < 0 || count > regions.len / 24;
    for (Py_ssize_t i = 0; i < count && !outside; i++) {
        uint64_t first = (region[3 * i] - start) / PAGE_SIZE;
        uint64_t end = (region[3 * i + 1] - start) / PAGE_SIZE;
        if (region[3 * i] < start || end <= first || end > pages) {
            outside = 1;
            break;
        }
        uint64_t low = first / 64, high = (end - 1) / 64;
        uint64_t from = ~0ULL << (first % 64), to = ~0ULL >> (63 - (end - 1) % 64);
        if (low == high) {
            words[low] |= from & to;
            continue;
        }
        words[low] |= from;
        memset(words + low + 1, 0xff, (high - low - 1) * 8);
        words[high] |= to;
    }
    PyBuffer_Release(&regions);
    PyBuffer_Release(&bitmap);
    if (outside) {
        PyErr_SetString(PyExc_ValueError, "a region lies outside of the bitmap");
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"or_regions", or_regions, METH_VARARGS, or_regions_doc},
    {"scan", scan, METH_VARARGS, scan_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_pages",
    .m_doc = "Hashes, zero detection and bitmaps of pages in bulk.",
    .m_size = -1,
    .m_methods = methods,
};

PyMODINIT_FUNC PyInit__pages(void)
{
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2"))
        nh_page = nh_page_avx2;
#endif
    return PyModule_Create(&module);
}
