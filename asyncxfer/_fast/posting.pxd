"""What every transfer costs, whatever it moves: being posted, held, counted and awaited."""

from libc.stdint cimport int64_t, uint64_t

from asyncxfer._fast.completion cimport Completion, CompletionQueue, Prepared
from asyncxfer._fast.link cimport Link


cdef class Usable:
    cdef public object closed


cdef class Counter:
    cdef readonly uint64_t transfers, nbytes, failed
    cdef int64_t ns


cdef class Roster(Usable):
    cdef readonly CompletionQueue queue
    cdef readonly type kind
    cdef set flying


cdef class Posted:
    cdef readonly Roster flights
    cdef readonly object op         # "put" or "get"
    cdef readonly uint64_t nbytes
    cdef readonly uint64_t descriptors
    cdef readonly object backend    # its name
    cdef readonly Link link
    cdef readonly Counter counter
    cdef readonly tuple sides
    cdef bint put


cdef class Poster(Posted):
    cdef Usable here, there
    cdef Prepared at_once           # None: nothing can be done within the call that posts


cdef class Posting(Completion):
    cdef readonly Posted plan
    cdef readonly Roster flights
    cdef public list waiters        # futures
    cdef public object timer        # of the loop; None: it watches no time limit
    cdef public bint asked          # somebody has been told how it failed, or will be
    cdef public bint over           # nothing is left to be settled

    cdef int start(self, Posted plan, bytes notify, timeout) except -1
    cdef void count(self) noexcept
    cpdef did(self)
