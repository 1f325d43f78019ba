"""What kvxfer may know of the software device besides its table of verbs."""

from libc.stdint cimport uint64_t

cdef extern from "softdev.h" nogil:
    struct kvx_soft_counts:
        uint64_t contexts
        uint64_t pds
        uint64_t mrs
        uint64_t cqs
        uint64_t channels
        uint64_t qps
        uint64_t connections
        uint64_t threads

    void kvx_get_soft_counts "kvx_soft_counts" (kvx_soft_counts *counts)
    size_t kvx_soft_take_violations(char *text, size_t size)
