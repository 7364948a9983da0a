# cython: language_level=3, boundscheck=False, wraparound=False, auto_pickle=False, autotestdict=False
"""What every transfer costs, whatever it moves: being posted, held, counted and awaited.

A small transfer takes a microsecond or two, of which moving the bytes is about half. So what Python would do once a
transfer is done here: looking whether agent and regions are still open, making the object, doing it at once where the
backend can, and counting it. All that takes longer, and all that goes wrong, is left to the classes that derive from
these (`_plan`, `_transfer`). It knows no loop, no future and no backend.
"""

from asyncxfer._fast.completion cimport CANCELLED, OK, TURN_NS
from asyncxfer._fast.native cimport axf_load

from asyncxfer._done import Done

cdef extern from *:
    """
    static inline PyObject *axf_new(PyTypeObject *type, PyObject *args) { return type->tp_new(type, args, 0); }
    static inline PyObject *axf_named_tuple(PyTypeObject *type, PyObject *args) {
        return PyTuple_Type.tp_new(type, args, 0);
    }
    """
    object axf_new(type kind, tuple args)
    object axf_named_tuple(type kind, tuple args)       # as `_make` does it

cdef tuple NOTHING = ()
cdef type DONE = Done

# What awaiting a transfer that has ended by then takes of the loop's time.
cdef int64_t AWAIT_NS = 1_000


cdef class Usable:
    """What transfers stand on, as an agent or a region.

    Attributes
    ----------
    closed : str or None
        Why it can no longer be used; None while it can.
    """


cdef class Counter:
    """What went over one backend to one peer in one direction: transfers, bytes, failed transfers."""

    @property
    def seconds(self) -> float:
        """Of all that went well, together."""
        return self.ns / 1e9

    def figures(self) -> dict[str, float]:
        """By name."""
        return {"transfers": self.transfers, "nbytes": self.nbytes, "failed": self.failed, "seconds": self.seconds}


cdef class Roster(Usable):
    """The transfers of one agent that are in flight.

    Parameters
    ----------
    queue : CompletionQueue
        Where their ends are announced.
    kind : type
        What is made of each, a `Posting`.
    """

    def __init__(self, CompletionQueue queue not None, type kind not None) -> None:
        if not issubclass(kind, Posting):
            raise TypeError(f"{kind} is no Posting")
        self.queue, self.kind, self.flying = queue, kind, set()

    def add(self, Posting transfer not None) -> None:
        """Hold a transfer until it has ended."""
        self.flying.add(transfer)

    def discard(self, Posting transfer not None) -> None:
        """Let go of a transfer."""
        self.flying.discard(transfer)

    def all(self) -> list:
        """Every transfer in flight."""
        return list(self.flying)

    def clear(self) -> None:
        """Let go of all."""
        self.flying.clear()


cdef class Posted:
    """What transfers are posted from: a plan, or what stands for one where nothing moves.

    Parameters
    ----------
    flights : Roster
    op : "put" or "get"
    nbytes, descriptors : int
        That each moves.
    backend : str
    counter : Counter
    sides : tuple of Usable
        The regions that it reads and writes: two, or none.
    link : Link or None
        To the peer.
    """

    def __init__(
        self, Roster flights not None, str op not None, *, uint64_t nbytes, uint64_t descriptors, str backend not None,
        Counter counter not None, tuple sides not None, Link link=None,
    ) -> None:
        self.flights, self.op, self.put = flights, op, op == "put"
        self.nbytes, self.descriptors, self.backend = nbytes, descriptors, backend
        self.counter, self.sides, self.link = counter, sides, link

cdef class Poster(Posted):
    """What can be posted many times: calling it makes a transfer.

    Who derives from it gives `_check(notify, timeout)`, which raises where they are unusable, `_refuse()`, which says
    what has been closed, and `_post(transfer, notify, priority)`, which has a transfer carried that was not done at once.
    """

    def arm(self, prepared: object) -> None:
        """Say what the backend has made ready; where it can, it does it within the call."""
        self.here, self.there = self.sides
        self.at_once = prepared if isinstance(prepared, Prepared) and (<Prepared>prepared).immediate else None

    def __call__(self, *, notify=None, timeout=None, priority=0) -> Posting:
        cdef Posting transfer
        if notify is not None or timeout is not None:
            self._check(notify, timeout)
        transfer = <Posting>axf_new(self.flights.kind, NOTHING)
        transfer.start(self, <bytes>notify, timeout)
        # Nothing lets go of the GIL between this look and the end, or the entry into the roster: who closes one of
        # these comes before, or knows of the transfer.
        if self.flights.closed is not None or self.here.closed is not None or self.there.closed is not None:
            self._refuse()
        if self.at_once is not None and notify is None and self.at_once.run_at_once(transfer):
            transfer.over = True
            transfer.count()
        else:
            self.flights.flying.add(transfer)
            self._post(transfer, notify, priority)
        return transfer


cdef class Posting(Completion):
    """One transfer.

    Parameters
    ----------
    plan : Posted
    notify : bytes or None
        Tag that goes out behind the data.
    timeout : float or None, seconds
    """

    def __init__(self, Posted plan not None, bytes notify=None, timeout=None) -> None:
        self.start(plan, notify, timeout)

    cdef int start(self, Posted plan, bytes notify, timeout) except -1:
        self.plan, self.flights, self.waiters = plan, plan.flights, []
        self.begin(plan.flights.queue, plan.nbytes, plan.put, plan.link, notify, timeout)
        return 0

    cdef void count(self) noexcept:
        cdef Counter counter = self.plan.counter
        if self.op.status == OK:
            counter.transfers += 1
            counter.nbytes += self.plan.nbytes
            counter.ns += self.op.ended - self.op.started
        else:
            counter.failed += 1

    def account(self) -> None:
        """It has ended: count it and let go of it."""
        self.flights.flying.discard(self)
        self.count()

    def swift(self) -> Done | None:
        """Give what it did if it went well within the call that posted it, and the loop need not turn yet."""
        cdef int64_t took
        if self.op.inline_ != 1 or self.op.status != OK:
            return None
        took = self.op.ended - self.op.started
        if self.queue.inline_ns + took + AWAIT_NS >= TURN_NS:
            return None
        self.queue.inline_ns += took + AWAIT_NS
        return self.did()

    cpdef did(self):
        """Give what it did; only when it has ended well."""
        cdef Posted plan = self.plan
        cdef double seconds = (self.op.ended - self.op.started) / 1e9
        return axf_named_tuple(DONE, ((plan.nbytes, seconds, plan.backend, plan.descriptors),))

    def __del__(self) -> None:
        cdef int status = self.op.status
        if axf_load(&self.op.state) and not (self.asked or status == OK or status == CANCELLED):
            self._unheard()

    def _unheard(self) -> None:
        """It has failed, and nobody will ask how."""
