/* CRC-64/NVME, the checksum that object stores keep of whole objects: by carry-less multiplication where the processor
 * has it, else by tables.
 *
 * Bits are reflected: x^63 is the lowest, x^0 the highest. A product of two such words, as the instruction gives it in
 * 128 bits, is theirs times x. So 128 bits of a message are moved on by D bits, modulo the polynomial, as the first
 * word times x^(D+63) and the second times x^(D-1); what lies there is added, and what is left at the end of it all is
 * 16 bytes with the checksum of everything, which the tables finish.
 *
 * Each module that includes this has tables of its own, 16 KiB, filled when it is loaded.
 */
#ifndef ASYNCXFER_CRC64_H
#define ASYNCXFER_CRC64_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#define AXF_CRC64_16 __attribute__((target("pclmul,sse4.1")))
#define AXF_CRC64_64 __attribute__((target("vpclmulqdq,avx512f,pclmul,sse4.1")))
#endif

#define AXF_CRC64_POLYNOMIAL 0x9a6c9329ac4bc9b5u

enum { AXF_CRC64_BY_TABLES = 0, AXF_CRC64_BY_16 = 16, AXF_CRC64_BY_64 = 64 };

static uint64_t axf_crc64_tables[8][256]; /* [k][v]: the byte v and then k bytes of zero */
static uint64_t axf_crc64_on[5][2];       /* for 16, 32, 48, 64 and 256 bytes: x^(D+63), x^(D-1) */
static int axf_crc64_best;                /* how many bytes one instruction multiplies */

/* The product of two polynomials modulo that of the checksum. */
static uint64_t axf_crc64_product(uint64_t a, uint64_t b) {
    uint64_t product = 0;
    for (; a; a <<= 1) {
        if (a >> 63) product ^= b;
        b = b >> 1 ^ (b & 1 ? AXF_CRC64_POLYNOMIAL : 0);
    }
    return product;
}

/* base to the power of n. */
static uint64_t axf_crc64_power(uint64_t base, uint64_t n) {
    uint64_t power = 1ull << 63;
    for (; n; n >>= 1) {
        if (n & 1) power = axf_crc64_product(power, base);
        base = axf_crc64_product(base, base);
    }
    return power;
}

/* The checksum of two pieces one after the other, from theirs and how long the second is. */
static uint64_t axf_crc64_combine(uint64_t first, uint64_t second, uint64_t length) {
    return axf_crc64_product(first, axf_crc64_power(1ull << 55, length)) ^ second; /* x^8 is one byte */
}

__attribute__((constructor)) static void axf_crc64_prepare(void) {
    static const int distances[5] = {16, 32, 48, 64, 256};
    for (uint64_t v = 0; v < 256; ++v) axf_crc64_tables[0][v] = axf_crc64_product(v, 1ull << 55);
    for (int k = 1; k < 8; ++k)
        for (int v = 0; v < 256; ++v) {
            uint64_t before = axf_crc64_tables[k - 1][v];
            axf_crc64_tables[k][v] = before >> 8 ^ axf_crc64_tables[0][before & 255];
        }
    for (int i = 0; i < 5; ++i) {
        axf_crc64_on[i][0] = axf_crc64_power(1ull << 62, 8 * distances[i] + 63);
        axf_crc64_on[i][1] = axf_crc64_power(1ull << 62, 8 * distances[i] - 1);
    }
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1")) {
        axf_crc64_best = AXF_CRC64_BY_16;
        if (__builtin_cpu_supports("vpclmulqdq") && __builtin_cpu_supports("avx512f")) axf_crc64_best = AXF_CRC64_BY_64;
    }
#endif
}

/* All of these take and give the bare register, which starts and ends inverted. */

static uint64_t axf_crc64_by_table(uint64_t crc, const unsigned char *p, size_t n) {
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    for (; n >= 8; n -= 8, p += 8) {
        uint64_t v;
        memcpy(&v, p, 8);
        v ^= crc;
        crc = 0;
        for (int k = 0; k < 8; ++k) crc ^= axf_crc64_tables[7 - k][v >> 8 * k & 255];
    }
#endif
    for (; n; --n) crc = crc >> 8 ^ axf_crc64_tables[0][(crc ^ *p++) & 255];
    return crc;
}

#if defined(__x86_64__)
AXF_CRC64_16 static inline __m128i axf_crc64_move(__m128i x, int distance) {
    __m128i on = _mm_loadu_si128((const __m128i *)axf_crc64_on[distance]);
    return _mm_xor_si128(_mm_clmulepi64_si128(x, on, 0x00), _mm_clmulepi64_si128(x, on, 0x11));
}

AXF_CRC64_16 static inline __m128i axf_crc64_load(const unsigned char *p) {
    return _mm_loadu_si128((const __m128i *)p);
}

/* Fold what follows into `x`, 16 bytes at a time, and leave the rest to the tables. */
AXF_CRC64_16 static uint64_t axf_crc64_finish(__m128i x, const unsigned char *p, size_t n) {
    unsigned char left[16];
    for (; n >= 16; n -= 16, p += 16) x = _mm_xor_si128(axf_crc64_move(x, 0), axf_crc64_load(p));
    _mm_storeu_si128((__m128i *)left, x);
    return axf_crc64_by_table(axf_crc64_by_table(0, left, 16), p, n);
}

AXF_CRC64_16 static uint64_t axf_crc64_by_16(uint64_t crc, const unsigned char *p, size_t n) {
    if (n < 64) return axf_crc64_by_table(crc, p, n);
    __m128i a = _mm_xor_si128(axf_crc64_load(p), _mm_cvtsi64_si128((long long)crc));
    __m128i b = axf_crc64_load(p + 16), c = axf_crc64_load(p + 32), d = axf_crc64_load(p + 48);
    for (n -= 64, p += 64; n >= 64; n -= 64, p += 64) {
        a = _mm_xor_si128(axf_crc64_move(a, 3), axf_crc64_load(p));
        b = _mm_xor_si128(axf_crc64_move(b, 3), axf_crc64_load(p + 16));
        c = _mm_xor_si128(axf_crc64_move(c, 3), axf_crc64_load(p + 32));
        d = _mm_xor_si128(axf_crc64_move(d, 3), axf_crc64_load(p + 48));
    }
    a = _mm_xor_si128(axf_crc64_move(a, 2), axf_crc64_move(b, 1));
    return axf_crc64_finish(_mm_xor_si128(_mm_xor_si128(a, axf_crc64_move(c, 0)), d), p, n);
}

AXF_CRC64_64 static inline __m512i axf_crc64_fold(__m512i x, __m512i on, __m512i more) {
    return _mm512_ternarylogic_epi64(
        _mm512_clmulepi64_epi128(x, on, 0x00), _mm512_clmulepi64_epi128(x, on, 0x11), more, 0x96); /* xor of three */
}

AXF_CRC64_64 static uint64_t axf_crc64_by_64(uint64_t crc, const unsigned char *p, size_t n) {
    if (n < 512) return axf_crc64_by_16(crc, p, n);
    __m512i far = _mm512_broadcast_i32x4(axf_crc64_load((const unsigned char *)axf_crc64_on[4]));
    __m512i near = _mm512_broadcast_i32x4(axf_crc64_load((const unsigned char *)axf_crc64_on[3]));
    __m512i a = _mm512_xor_si512(
        _mm512_loadu_si512(p), _mm512_zextsi128_si512(_mm_cvtsi64_si128((long long)crc)));
    __m512i b = _mm512_loadu_si512(p + 64), c = _mm512_loadu_si512(p + 128), d = _mm512_loadu_si512(p + 192);
    for (n -= 256, p += 256; n >= 256; n -= 256, p += 256) {
        a = axf_crc64_fold(a, far, _mm512_loadu_si512(p));
        b = axf_crc64_fold(b, far, _mm512_loadu_si512(p + 64));
        c = axf_crc64_fold(c, far, _mm512_loadu_si512(p + 128));
        d = axf_crc64_fold(d, far, _mm512_loadu_si512(p + 192));
    }
    a = axf_crc64_fold(axf_crc64_fold(axf_crc64_fold(a, near, b), near, c), near, d);
    __m128i x = _mm_xor_si128(
        axf_crc64_move(_mm512_extracti32x4_epi32(a, 0), 2), axf_crc64_move(_mm512_extracti32x4_epi32(a, 1), 1));
    x = _mm_xor_si128(x, axf_crc64_move(_mm512_extracti32x4_epi32(a, 2), 0));
    return axf_crc64_finish(_mm_xor_si128(x, _mm512_extracti32x4_epi32(a, 3)), p, n);
}
#endif

/* The checksum of `n` bytes that follow those whose checksum is `crc`, which is 0 where nothing came before; `width` is
 * one of the enumeration above, at most axf_crc64_best. */
static inline uint64_t axf_crc64(uint64_t crc, const void *data, size_t n, int width) {
    const unsigned char *p = (const unsigned char *)data;
#if defined(__x86_64__)
    if (width == AXF_CRC64_BY_64) return ~axf_crc64_by_64(~crc, p, n);
    if (width == AXF_CRC64_BY_16) return ~axf_crc64_by_16(~crc, p, n);
#endif
    (void)width;
    return ~axf_crc64_by_table(~crc, p, n);
}

#endif
