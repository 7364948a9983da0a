/* CRC-32C (Castagnoli), the checksum of iSCSI, ext4 and object stores: by the processor's instruction where there is
 * one, else by tables.
 *
 * The instruction takes three cycles and one can begin in each, so long inputs are three streams side by side whose
 * checksums are put together: the checksum of what comes first is shifted past what follows, which is a product with
 * a power of x modulo the polynomial, and that is linear, so four look-ups. Bits are reflected: x^0 is the highest.
 *
 * Each module that includes this has tables of its own, 16 KiB, filled when it is loaded.
 */
#ifndef ASYNCXFER_CRC32C_H
#define ASYNCXFER_CRC32C_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <nmmintrin.h>
#define AXF_CRC32C_TARGET __attribute__((target("sse4.2")))
#define AXF_CRC32C_8(crc, v) ((uint32_t)_mm_crc32_u64(crc, v))
#define AXF_CRC32C_1(crc, v) _mm_crc32_u8(crc, v)
#elif defined(__aarch64__) && defined(__ARM_FEATURE_CRC32)
#include <arm_acle.h>
#define AXF_CRC32C_TARGET
#define AXF_CRC32C_8(crc, v) __crc32cd(crc, v)
#define AXF_CRC32C_1(crc, v) __crc32cb(crc, v)
#endif

#define AXF_CRC32C_LONG 4096
#define AXF_CRC32C_SHORT 256

static uint32_t axf_crc32c_tables[8][256]; /* [k][v]: the byte v and then k bytes of zero */
static uint32_t axf_crc32c_past_long[4][256], axf_crc32c_past_short[4][256];
static int axf_crc32c_hardware;

/* The product of two polynomials modulo that of CRC-32C. */
static uint32_t axf_crc32c_product(uint32_t a, uint32_t b) {
    uint32_t product = 0;
    for (; a; a <<= 1) {
        if (a >> 31) product ^= b;
        b = b >> 1 ^ (b & 1 ? 0x82f63b78u : 0);
    }
    return product;
}

/* What shifting past `bytes` does to each of the four bytes of a checksum. */
static void axf_crc32c_fill(uint32_t past[4][256], size_t bytes) {
    uint32_t power = 1u << 31, square = 1u << 23; /* x^0, and x^8: one byte */
    for (; bytes; bytes >>= 1) {
        if (bytes & 1) power = axf_crc32c_product(power, square);
        square = axf_crc32c_product(square, square);
    }
    for (int k = 0; k < 4; ++k)
        for (uint32_t v = 1; v < 256; ++v)
            past[k][v] = past[k][v & (v - 1)] ^ axf_crc32c_product((v & -v) << 8 * k, power);
}

__attribute__((constructor)) static void axf_crc32c_prepare(void) {
    for (uint32_t v = 0; v < 256; ++v) axf_crc32c_tables[0][v] = axf_crc32c_product(v, 1u << 23);
    for (int k = 1; k < 8; ++k)
        for (uint32_t v = 0; v < 256; ++v) {
            uint32_t before = axf_crc32c_tables[k - 1][v];
            axf_crc32c_tables[k][v] = before >> 8 ^ axf_crc32c_tables[0][before & 255];
        }
    axf_crc32c_fill(axf_crc32c_past_long, AXF_CRC32C_LONG);
    axf_crc32c_fill(axf_crc32c_past_short, AXF_CRC32C_SHORT);
#if defined(__x86_64__)
    __builtin_cpu_init();
    axf_crc32c_hardware = __builtin_cpu_supports("sse4.2") != 0;
#elif defined(AXF_CRC32C_TARGET)
    axf_crc32c_hardware = 1;
#endif
}

static inline uint64_t axf_crc32c_load(const unsigned char *p) {
    uint64_t v;
    memcpy(&v, p, 8);
    return v;
}

/* Both of these take and give the bare register, which starts and ends inverted. */

static uint32_t axf_crc32c_by_table(uint32_t crc, const unsigned char *p, size_t n) {
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    for (; n >= 8; n -= 8, p += 8) {
        uint64_t v = axf_crc32c_load(p) ^ crc;
        crc = 0;
        for (int k = 0; k < 8; ++k) crc ^= axf_crc32c_tables[7 - k][v >> 8 * k & 255];
    }
#endif
    for (; n; --n) crc = crc >> 8 ^ axf_crc32c_tables[0][(crc ^ *p++) & 255];
    return crc;
}

#ifdef AXF_CRC32C_TARGET
static inline uint32_t axf_crc32c_shift(uint32_t past[4][256], uint32_t crc) {
    return past[0][crc & 255] ^ past[1][crc >> 8 & 255] ^ past[2][crc >> 16 & 255] ^ past[3][crc >> 24];
}

AXF_CRC32C_TARGET static inline uint32_t axf_crc32c_three(
    uint32_t first, const unsigned char *p, size_t length, uint32_t past[4][256]) {
    uint32_t second = 0, third = 0;
    for (const unsigned char *end = p + length; p < end; p += 8) {
        first = AXF_CRC32C_8(first, axf_crc32c_load(p));
        second = AXF_CRC32C_8(second, axf_crc32c_load(p + length));
        third = AXF_CRC32C_8(third, axf_crc32c_load(p + 2 * length));
    }
    return axf_crc32c_shift(past, axf_crc32c_shift(past, first) ^ second) ^ third;
}

AXF_CRC32C_TARGET static uint32_t axf_crc32c_by_hardware(uint32_t crc, const unsigned char *p, size_t n) {
    for (; n && (uintptr_t)p & 7; --n) crc = AXF_CRC32C_1(crc, *p++);
    for (; n >= 3 * AXF_CRC32C_LONG; n -= 3 * AXF_CRC32C_LONG, p += 3 * AXF_CRC32C_LONG)
        crc = axf_crc32c_three(crc, p, AXF_CRC32C_LONG, axf_crc32c_past_long);
    for (; n >= 3 * AXF_CRC32C_SHORT; n -= 3 * AXF_CRC32C_SHORT, p += 3 * AXF_CRC32C_SHORT)
        crc = axf_crc32c_three(crc, p, AXF_CRC32C_SHORT, axf_crc32c_past_short);
    for (; n >= 8; n -= 8, p += 8) crc = AXF_CRC32C_8(crc, axf_crc32c_load(p));
    for (; n; --n) crc = AXF_CRC32C_1(crc, *p++);
    return crc;
}
#endif

/* The checksum of `n` bytes that follow those whose checksum is `crc`, which is 0 where nothing came before. */
static inline uint32_t axf_crc32c(uint32_t crc, const void *data, size_t n) {
#ifdef AXF_CRC32C_TARGET
    if (axf_crc32c_hardware) return ~axf_crc32c_by_hardware(~crc, (const unsigned char *)data, n);
#endif
    return ~axf_crc32c_by_table(~crc, (const unsigned char *)data, n);
}

#endif
