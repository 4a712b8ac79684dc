//! Fork-join over the compute threads: one job at a time, its pieces handed out by atomic counters, one a thread's share.
//!
//! A thread goes through its share in order, as memory is read fastest so, then helps with what the others have left
//! (but for small pieces at a share's end).
//!
//! The caller works too, so one thread needs no others. A job is over when its pieces are done: a thread that has not
//! even begun (its core is busy with something else) is not waited for. Threads spin briefly between jobs, then sleep.
//! What the pieces are is said by [`Pieces`]; nothing here depends on which thread takes which piece.
#![expect(unsafe_code, reason = "a job on the caller's stack is lent to other threads")]

use std::any::Any;
use std::cell::UnsafeCell;
use std::iter::{self, StepBy};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{JoinHandle, Thread};

use super::pieces::Pieces;

/// Rounds of `spin_loop` before sleeping: some 25 µs.
const SPINS: u32 = 1000;
/// Times a thread then lets others run on its core, if there are any, before it sleeps: some 100 µs, as what comes between
/// two steps takes.
const YIELDS: u32 = 150;
/// Set in `Shared::state` while threads may still enter the job.
const OPEN: u64 = 1 << 31;
/// Set in `Shared::state` once the caller sleeps until nobody is inside.
const PARKED: u64 = 1 << 30;
/// Bits of `Shared::state` that count the threads inside the job (the caller not counted).
const INSIDE: u64 = PARKED - 1;
/// One more job in `Shared::state`.
const NEXT_JOB: u64 = 1 << 32;

/// The compute threads. Dropping ends them.
pub struct Threads {
    shared: Arc<Shared>,
    others: Vec<JoinHandle<()>>,
    /// Of the pieces of the job, one a thread.
    shares: Vec<Share>,
}

/// What runs on each thread that enters: gets the thread's number.
type Body<'a> = dyn Fn(usize) + Sync + 'a;

struct Shared {
    /// Number of the job (upper 32 bits), [`OPEN`], threads inside.
    state: AtomicU64,
    /// The job, valid while the state is open or a thread is inside. Written by the caller before it opens the state.
    job: UnsafeCell<Option<*const Body<'static>>>,
    sleepers: AtomicUsize,
    stop: AtomicBool,
    lock: Mutex<()>,
    wake: Condvar,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    /// Who called for the job, before it sets [`PARKED`].
    caller: Mutex<Option<Thread>>,
    /// One a thread.
    ahead: Vec<Ahead>,
}

// SAFETY: `job` is written only by the one caller (`run` takes `&mut Threads`) while no thread is inside and the state is closed.
unsafe impl Sync for Shared {}
// SAFETY: as above; the pointer in `job` is only followed between entering and leaving a job, whose body is `Sync`.
unsafe impl Send for Shared {}

impl Threads {
    /// `count` threads, the caller of [`Threads::each`] included; 0 counts as 1.
    ///
    /// # Errors
    /// What the system says when it has no thread to give.
    pub fn new(count: usize) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            job: UnsafeCell::new(None),
            sleepers: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            lock: Mutex::new(()),
            wake: Condvar::new(),
            panic: Mutex::new(None),
            caller: Mutex::new(None),
            ahead: (0..count.max(1)).map(|_| Ahead::default()).collect(),
        });
        let shares = (0..count.max(1)).map(|_| Share::default()).collect();
        let mut threads = Self { shared, others: Vec::new(), shares };
        for number in 1..count {
            let shared = Arc::clone(&threads.shared);
            let thread = std::thread::Builder::new()
                .name(format!("compute-{number}"))
                .spawn(move || shared.serve(number))?;
            threads.others.push(thread);
        }
        Ok(threads)
    }

    /// Threads that take pieces.
    pub fn count(&self) -> usize {
        self.others.len() + 1
    }

    /// Says what `thread` will read first in the next job but one: if it has to wait for that job, it has these bytes
    /// fetched into its second cache, as many as the wait is long.
    pub fn fetch_ahead(&self, thread: usize, bytes: &[u8]) {
        let ahead = &self.shared.ahead[thread];
        ahead.start.store(bytes.as_ptr().addr(), Ordering::Relaxed);
        ahead.bytes.store(bytes.len(), Ordering::Relaxed);
    }

    /// Calls `body` once with each piece and its index, and one of `scratch` that is the thread's own meanwhile.
    ///
    /// # Panics
    /// If there are fewer `scratch` than threads; and with what `body` panicked with.
    pub fn each<S: Send, P: Pieces>(
        &mut self,
        scratch: &mut [S],
        pieces: P,
        body: impl Fn(&mut S, usize, P::Piece) + Sync,
    ) {
        let count = pieces.count();
        assert!(scratch.len() >= self.count(), "one scratch for each thread");
        if count <= 1 || self.others.is_empty() {
            for index in 0..count {
                // SAFETY: the loop gives each index once.
                body(&mut scratch[0], index, unsafe { pieces.piece(index) });
            }
            return;
        }
        let threads = self.count();
        let mut start = 0;
        for (thread, share) in self.shares.iter_mut().enumerate() {
            let end = pieces.share_end(thread, threads);
            assert!(start <= end && end <= count, "shares ascend");
            *share = Share::new(start..end, pieces.kept());
            start = end;
        }
        assert_eq!(start, count, "shares are all pieces");
        let scratch = ScratchPointer(scratch.as_mut_ptr());
        self.run(&|shares, thread| {
            // SAFETY: `thread` is below `count()` (asserted to be in bounds) and entered by one thread only.
            let scratch = unsafe { &mut *scratch.of(thread) };
            let (before, from) = shares.split_at(thread);
            let (own, behind) = from.split_first().expect("one share a thread");
            own.begin();
            let left = behind.iter().chain(before);
            let left = left.flat_map(|share| iter::from_fn(move || share.help()));
            for index in iter::from_fn(|| own.take()).chain(left) {
                // SAFETY: shares have no index in common, and each gives its own once.
                body(scratch, index, unsafe { pieces.piece(index) });
            }
        });
    }

    /// Runs `body` here and on every other thread that comes in time; returns when none is inside any more.
    fn run(&mut self, body: &(dyn Fn(&[Share], usize) + Sync)) {
        let shares = &self.shares[..];
        let body: &Body<'_> = &|thread| body(shares, thread);
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes; no thread follows the pointer after `join`, and `body` outlives that.
        let lent = unsafe { std::mem::transmute::<*const Body<'_>, *const Body<'static>>(body) };
        // SAFETY: the state is closed and no thread is inside (the last job waited for that), so nobody reads `job`.
        unsafe { *shared.job.get() = Some(lent) };
        let job = (shared.state.load(Ordering::Relaxed) & !(NEXT_JOB - 1)).wrapping_add(NEXT_JOB);
        shared.state.store(job | OPEN, Ordering::SeqCst);
        if shared.sleepers.load(Ordering::SeqCst) > 0 {
            let _guard = lock(&shared.lock);
            shared.wake.notify_all();
        }
        let mine = catch_unwind(AssertUnwindSafe(|| body(0)));
        shared.join();
        let theirs = lock(&shared.panic).take();
        if let Some(panic) = mine.err().or(theirs) {
            resume_unwind(panic);
        }
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        {
            let _guard = lock(&self.shared.lock);
            self.shared.wake.notify_all();
        }
        for thread in self.others.drain(..) {
            // A compute thread catches its job's panics and has nothing else to tell.
            let _ = thread.join();
        }
    }
}

impl std::fmt::Debug for Threads {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Threads").field("count", &self.count()).finish_non_exhaustive()
    }
}

impl Shared {
    fn serve(&self, thread: usize) {
        let mut done = 0;
        while let Some(job) = self.enter(thread, done) {
            done = job;
            // SAFETY: this thread is inside, so `run` has not returned: `job` is set and not written, its body alive.
            let body = unsafe { &*(*self.job.get()).expect("a job is set before it is opened") };
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| body(thread))) {
                lock(&self.panic).get_or_insert(panic);
            }
            let state = self.state.fetch_sub(1, Ordering::AcqRel) - 1;
            if state & (OPEN | PARKED | INSIDE) == PARKED {
                // A caller that woke by itself and went on is woken once for nothing.
                if let Some(caller) = &*lock(&self.caller) {
                    caller.unpark();
                }
            }
        }
    }

    /// Waits for an open job other than `done` and enters it; `None` at the end of all.
    fn enter(&self, thread: usize, done: u64) -> Option<u64> {
        let mut spins = 0;
        let mut ahead = self.ahead[thread].lines();
        loop {
            if self.stop.load(Ordering::Relaxed) {
                return None;
            }
            let state = self.state.load(Ordering::Relaxed);
            if Self::is_news(state, done) {
                let entered = self.state.compare_exchange_weak(
                    state,
                    state + 1,
                    Ordering::AcqRel,
                    Ordering::Relaxed,
                );
                if entered.is_ok() {
                    return Some(state & !(NEXT_JOB - 1));
                }
            } else if spins < SPINS {
                spins += 1;
                wait(&mut ahead);
            } else if spins < SPINS + YIELDS {
                spins += 1;
                std::thread::yield_now();
            } else {
                self.sleep(done);
                spins = 0;
            }
        }
    }

    fn sleep(&self, done: u64) {
        let mut guard = lock(&self.lock);
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        // The caller opens a job, then looks for sleepers, then takes the lock to wake them: none is missed.
        while !self.stop.load(Ordering::SeqCst)
            && !Self::is_news(self.state.load(Ordering::SeqCst), done)
        {
            guard = self.wake.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
    }

    /// Closes the job and waits until nobody is inside.
    fn join(&self) {
        let mut state = self.state.fetch_and(!OPEN, Ordering::AcqRel);
        let mut spins = 0;
        let mut ahead = self.ahead[0].lines();
        while state & INSIDE != 0 {
            if spins < SPINS {
                spins += 1;
                wait(&mut ahead);
            } else if state & PARKED == 0 {
                *lock(&self.caller) = Some(std::thread::current());
                self.state.fetch_or(PARKED, Ordering::AcqRel);
            } else {
                // The last one to leave unparks; an older unpark only makes this look once more.
                std::thread::park();
            }
            state = self.state.load(Ordering::Acquire);
        }
    }

    fn is_news(state: u64, done: u64) -> bool {
        state & OPEN != 0 && state & !(NEXT_JOB - 1) != done
    }
}

/// Pieces `next..end` that nobody has taken, in cache lines of its own: a thread writes in its share often.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Share {
    next: AtomicUsize,
    end: usize,
    /// How many of the last ones are left to the share's own thread once it has begun.
    kept: usize,
    /// Whether it has; it then takes all that is left.
    begun: AtomicBool,
}

impl Share {
    fn new(pieces: Range<usize>, kept: usize) -> Self {
        let Range { start, end } = pieces;
        Self { next: AtomicUsize::new(start), end, kept, begun: AtomicBool::new(false) }
    }

    /// Its own thread is there.
    fn begin(&self) {
        self.begun.store(true, Ordering::Relaxed);
    }

    /// For another thread: takes one unless its own thread does better alone.
    fn help(&self) -> Option<usize> {
        let kept = if self.begun.load(Ordering::Relaxed) { self.kept } else { 0 };
        let left = self.next.load(Ordering::Relaxed) + kept < self.end;
        left.then(|| self.take()).flatten()
    }

    /// For its own thread.
    fn take(&self) -> Option<usize> {
        // Looking first leaves the line where it is if there is nothing to take.
        let left = self.next.load(Ordering::Relaxed) < self.end;
        let index = left.then(|| self.next.fetch_add(1, Ordering::Relaxed));
        index.filter(|index| *index < self.end)
    }
}

/// What a thread will read first in the next job.
#[derive(Debug, Default)]
struct Ahead {
    start: AtomicUsize,
    bytes: AtomicUsize,
}

impl Ahead {
    fn lines(&self) -> StepBy<Range<usize>> {
        let start = self.start.load(Ordering::Relaxed);
        (start..start.saturating_add(self.bytes.load(Ordering::Relaxed))).step_by(64)
    }
}

/// Lines a wait of some 25 ns asks for. The processor has room for 64 and gets 32 in 0.1 µs; what it has no room for it
/// drops.
const FETCHED: usize = 8;

/// Waits a moment; has some more of what comes next fetched meanwhile.
fn wait(ahead: &mut StepBy<Range<usize>>) {
    ahead.by_ref().take(FETCHED).for_each(fetch);
    std::hint::spin_loop();
}

/// Asks for a cache line. Nothing is read as far as the language is concerned, and no address is wrong.
fn fetch(line: usize) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: a prefetch has no effect but in caches, whatever the address.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(std::ptr::without_provenance(line)) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    std::hint::black_box(line);
}

/// First of the threads' scratches.
struct ScratchPointer<S>(*mut S);

// SAFETY: each element is reached by one thread only, and `S: Send` where this is made.
unsafe impl<S: Send> Sync for ScratchPointer<S> {}

impl<S> ScratchPointer<S> {
    fn of(&self, thread: usize) -> *mut S {
        self.0.wrapping_add(thread)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::super::pieces::grid::Grid;
    use super::super::pieces::{Count, Split};
    use super::*;

    #[test]
    fn each_piece_is_taken_once_whatever_the_number_of_threads() {
        for count in 1..5 {
            let mut threads = Threads::new(count).unwrap();
            let mut scratch = vec![0_usize; count];
            let mut data = vec![0_u32; 1000];
            for round in 1..200 {
                threads.each(&mut scratch, Split::even(&mut data, 7), |seen, index, piece| {
                    *seen += piece.len();
                    for (at, value) in piece.iter_mut().enumerate() {
                        *value += (index * 7 + at) as u32;
                    }
                });
                assert!(data.iter().enumerate().all(|(at, &value)| value as usize == at * round));
            }
            assert_eq!(scratch.iter().sum::<usize>(), 1000 * 199);
            let mut row = vec![0.0_f32; 1000];
            for round in 1..200 {
                let band = std::slice::from_ref(&(0..1));
                let grid = Grid::tapered(&mut row, 1000, band, (8, 3), (count, 4));
                threads.each(&mut scratch, grid, |_, _, mut piece| {
                    piece.row(0).iter_mut().for_each(|value| *value += 1.0);
                });
                assert!(row.iter().all(|&value| value == round as f32));
            }
        }
    }

    #[test]
    fn others_leave_the_end_of_a_share_to_its_thread_once_that_has_begun() {
        let help = |share: &Share| iter::from_fn(|| share.help()).collect::<Vec<_>>();
        let absent = Share::new(3..9, 4);
        assert_eq!(help(&absent), [3, 4, 5, 6, 7, 8], "of a thread that has not come, all");
        let begun = Share::new(3..9, 4);
        begun.begin();
        assert_eq!(help(&begun), [3, 4]);
        assert_eq!(iter::from_fn(|| begun.take()).collect::<Vec<_>>(), [5, 6, 7, 8]);
        assert!(help(&begun).is_empty());
        let short = Share::new(0..2, 4);
        short.begin();
        assert!(help(&short).is_empty());
    }

    #[test]
    fn sleeping_threads_wake_for_the_next_job() {
        let mut threads = Threads::new(3).unwrap();
        while threads.shared.sleepers.load(Ordering::SeqCst) < 2 {
            std::thread::yield_now();
        }
        let met = std::sync::Barrier::new(3);
        threads.each(&mut [(); 3], Count(3), |(), _, ()| {
            met.wait();
        });
    }

    #[test]
    fn a_panic_in_a_piece_reaches_the_caller_and_the_threads_live_on() {
        let mut threads = Threads::new(2).unwrap();
        for bad in 0..20 {
            let caught = catch_unwind(AssertUnwindSafe(|| {
                threads.each(&mut [(); 2], Count(20), |(), index, ()| assert_ne!(index, bad));
            }));
            assert!(caught.is_err());
        }
        let done = AtomicUsize::new(0);
        threads.each(&mut [(); 2], Count(20), |(), _, ()| {
            done.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(done.into_inner(), 20);
    }
}
