"""The table of a provider, for what opens devices."""

from kvxfer._ibverbs cimport kvx_verbs_table


cdef kvx_verbs_table *table_of(str provider, str path) except NULL
