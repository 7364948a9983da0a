"""The little of pthreads, signal masks and scheduling that our own threads need; Cython declares none of it."""


cdef extern from "<signal.h>" nogil:
    ctypedef struct sigset_t:
        pass
    int sigfillset(sigset_t* s)
    int sigdelset(sigset_t* s, int number)
    int pthread_sigmask(int how, const sigset_t* new, sigset_t* old)
    enum: SIG_SETMASK, SIGBUS, SIGSEGV


cdef extern from "<pthread.h>" nogil:
    ctypedef unsigned long pthread_t
    ctypedef struct pthread_mutex_t:
        pass
    ctypedef struct pthread_cond_t:
        pass
    int pthread_mutex_init(pthread_mutex_t* m, void* attr)
    int pthread_mutex_lock(pthread_mutex_t* m)
    int pthread_mutex_trylock(pthread_mutex_t* m)
    int pthread_mutex_destroy(pthread_mutex_t* m)
    int pthread_mutex_unlock(pthread_mutex_t* m)
    int pthread_cond_init(pthread_cond_t* c, void* attr)
    int pthread_cond_wait(pthread_cond_t* c, pthread_mutex_t* m)
    int pthread_cond_signal(pthread_cond_t* c)
    int pthread_cond_broadcast(pthread_cond_t* c)
    int pthread_create(pthread_t* t, void* attr, void* (*run)(void*) noexcept nogil, void* arg)
    int pthread_join(pthread_t t, void** result)
    int pthread_setname_np(pthread_t t, const char* name)


cdef extern from *:
    """
    #include <stdint.h>
    #include <sys/syscall.h>
    #include <unistd.h>

    /* Says that the calling thread can wait: from Linux 6.12 on, a thread with a shorter slice that wakes up takes the
     * core from it at once. Elsewhere it changes nothing. struct sched_attr as in linux/sched/types.h, version 0. */
    static inline void axf_be_patient(void) {
        struct { uint32_t size, policy; uint64_t flags; int32_t nice; uint32_t priority;
                 uint64_t runtime, deadline, period; } a = {sizeof a, 0, 0, 0, 0, 0, 0, 0};
        if (syscall(SYS_sched_getattr, 0, &a, sizeof a, 0) != 0 || (a.policy != 0 && a.policy != 3)) return;
        a.flags = 0;
        a.runtime = 10000000; /* ns; the kernel's own is about 3 ms. More would make the thread wait as much on a busy machine */
        syscall(SYS_sched_setattr, 0, &a, 0);
    }
    """
    void axf_be_patient() noexcept nogil


cdef inline int start_thread(
    pthread_t* thread, void* (*run)(void*) noexcept nogil, const char* name, void* arg=NULL
) noexcept nogil:
    """Starts a thread of ours; 0 or errno. Signals stay with the program's own threads, faults excepted."""
    cdef sigset_t ours, before
    cdef int rc
    sigfillset(&ours)
    sigdelset(&ours, SIGBUS)
    sigdelset(&ours, SIGSEGV)
    pthread_sigmask(SIG_SETMASK, &ours, &before)
    rc = pthread_create(thread, NULL, run, arg)
    if rc == 0:
        pthread_setname_np(thread[0], name)
    pthread_sigmask(SIG_SETMASK, &before, NULL)
    return rc
