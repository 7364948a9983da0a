#ifndef ASYNCXFER_CRC32C_H
#define ASYNCXFER_CRC32C_H
#include <stddef.h>
#include <stdint.h>
#include <string.h>
__attribute__((target("sse4.2"))) static inline uint32_t axf_crc32c(uint32_t crc, const void *data, size_t n) {
    const unsigned char *p = data; uint64_t c = ~crc;
    for (; n >= 8; p += 8, n -= 8) { uint64_t v; memcpy(&v, p, 8); c = __builtin_ia32_crc32di(c, v); }
    for (; n; ++p, --n) c = __builtin_ia32_crc32qi((uint32_t)c, *p);
    return ~(uint32_t)c;
}
#endif
