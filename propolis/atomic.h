/* Loads, stores and fences with an explicit order: the only such place in the project.
 *
 * Guest memory is plain bytes that another party changes, so these are compiler builtins on plain types. Names: the
 * operation, the width in bits, then the order: rlx (relaxed), acq, rel, seq. Every use says which access on the other
 * side it pairs with. The same on gcc and clang, x86-64 and Arm.
 */
#ifndef PROPOLIS_ATOMIC_H
#define PROPOLIS_ATOMIC_H

#include <stdint.h>

#define PROPOLIS_ATOMIC(bits)                                                                                         \
    static inline uint##bits##_t ld##bits##_rlx(const void *p)                                                        \
    { return __atomic_load_n((const uint##bits##_t *)p, __ATOMIC_RELAXED); }                                          \
    static inline uint##bits##_t ld##bits##_acq(const void *p)                                                        \
    { return __atomic_load_n((const uint##bits##_t *)p, __ATOMIC_ACQUIRE); }                                          \
    static inline void st##bits##_rlx(void *p, uint##bits##_t v)                                                      \
    { __atomic_store_n((uint##bits##_t *)p, v, __ATOMIC_RELAXED); }                                                   \
    static inline void st##bits##_rel(void *p, uint##bits##_t v)                                                      \
    { __atomic_store_n((uint##bits##_t *)p, v, __ATOMIC_RELEASE); }

PROPOLIS_ATOMIC(8)
PROPOLIS_ATOMIC(16)
PROPOLIS_ATOMIC(32)
PROPOLIS_ATOMIC(64)

static inline void *ldptr_acq(void *const *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
static inline void stptr_rel(void **p, void *v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }

static inline uint32_t or32_seq(void *p, uint32_t v)
{ return __atomic_fetch_or((uint32_t *)p, v, __ATOMIC_SEQ_CST); }
static inline uint64_t or64_seq(void *p, uint64_t v)
{ return __atomic_fetch_or((uint64_t *)p, v, __ATOMIC_SEQ_CST); }
static inline uint32_t swap32_seq(void *p, uint32_t v)
{ return __atomic_exchange_n((uint32_t *)p, v, __ATOMIC_SEQ_CST); }
static inline uint64_t swap64_seq(void *p, uint64_t v)
{ return __atomic_exchange_n((uint64_t *)p, v, __ATOMIC_SEQ_CST); }
static inline uint64_t add64_rlx(void *p, uint64_t v)
{ return __atomic_fetch_add((uint64_t *)p, v, __ATOMIC_RELAXED); }
static inline int cas32_seq(void *p, uint32_t expected, uint32_t desired)
{
    return __atomic_compare_exchange_n((uint32_t *)p, &expected, desired, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
}

/* A full fence: orders an earlier store before a later load. */
static inline void fence_seq(void) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

/* Between two looks at memory that another party changes. */
static inline void cpu_relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

#endif
