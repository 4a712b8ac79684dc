// The kernels as a shared object for tests: each launch runs to its end, or to the first thing that no kernel may do.
// `sources.inc` includes the prelude and a source, for each in a namespace of its own; `entries.inc` lists ENTRY(source, kernel, most
// threads of a block): the tests' build writes both.

#include "shim.hpp"

#include <csignal>

#include "sources.inc"

using namespace host;

thread_local Machine* host::machine = nullptr;

#if defined(__x86_64__)
asm(R"(
.text
.hidden baton_switch
.globl baton_switch
.type baton_switch, @function
baton_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size baton_switch, .-baton_switch
)");
#else
#error "write a switch of stacks for this processor"
#endif

// Calls a kernel with arguments as `cuLaunchKernel` takes them: a pointer to each.
template <auto KERNEL_FUNCTION, class... A, std::size_t... I>
static void unpack(void (*)(A...), std::index_sequence<I...>, void** arguments) {
    KERNEL_FUNCTION(*(A*)arguments[I]...);
}
template <auto KERNEL_FUNCTION> struct Entry;
template <class... A, void (*KERNEL_FUNCTION)(A...)> struct Entry<KERNEL_FUNCTION> {
    static constexpr std::uint32_t parameters = sizeof...(A);
    static void call(void** arguments) {
        unpack<KERNEL_FUNCTION>(KERNEL_FUNCTION, std::index_sequence_for<A...>(), arguments);
    }
};

struct Known {
    const char* name;
    std::uint32_t most_threads, parameters;
    Call call;
};
#define ENTRY(source, kernel, threads) \
    {#kernel, threads, Entry<in_##source::kernel>::parameters, Entry<in_##source::kernel>::call},
static const Known KERNELS[] = {
#include "entries.inc"
};

static const Known* kernel_named(const char* name) {
    for (const Known& known : KERNELS)
        if (!std::strcmp(known.name, name)) return &known;
    return nullptr;
}

// A fiber's whole life.
static void live() {
    Machine& m = *machine;
    m.call(m.arguments);
    if (m.overlaps && !m.current->awaited) m.fail(Site{"end", 0}, "ends without `await_previous`");
    if (!m.current->copies.empty()) m.fail(Site{"end", 0}, "%zu copies were not waited for", m.current->copies.size());
    m.current->state = State::DONE;
    m.live--;
    m.leave();
}

static void report(Machine& m, const char* format, ...) {
    va_list rest;
    va_start(rest, format);
    m.report(nullptr, format, rest);
    va_end(rest);
}

// Everybody waits or has ended, and nobody can go on.
static void report_divergence(Machine& m) {
    m.current = nullptr;
    for (Thread& thread : m.fibers) {
        if (thread.state != State::WAITING) continue;
        Group& group = *thread.waits_in;
        std::uint32_t ended = 0, elsewhere = 0;
        for (std::uint32_t i = 0; i < group.count; i++) {
            Thread& other = m.fibers[group.first + i];
            if (other.state == State::DONE) ended++;
            else if (other.waits_in != &group) elsewhere++;
        }
        m.current = &thread;
        report(m, "waits at %s (%s:%d) with %u of %u threads; %u ended, %u wait elsewhere", name(group.meeting),
               group.site.name(), group.site.line, group.arrived, group.count, ended, elsewhere);
        return;
    }
}

static bool make_stacks(Machine& m, std::uint32_t threads) {
    while (m.stacks.size() < threads) {
        void* at = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (at == MAP_FAILED) return false;
        mprotect(at, PAGE, PROT_NONE);
        m.stacks.push_back((std::uint8_t*)at);
    }
    return true;
}

// Every thread at its beginning, shared memory poisoned.
static void prepare(Machine& m) {
    m.live = m.threads;
    std::memset(m.shared, POISON, m.shared_bytes);
    m.all = {};
    m.all.count = m.threads;
    for (std::uint32_t number = 0; number < m.threads; number++) {
        Warp& warp = m.warps[number / LANES];
        warp.first = number / LANES * LANES;
        warp.count = std::min<std::uint32_t>(m.threads - warp.first, LANES);
        warp.arrived = 0;
        Thread& thread = m.fibers[number];
        void** top = (void**)(m.stacks[number] + STACK);
        top[-1] = nullptr;
        top[-2] = (void*)live;
        std::memset(top - 8, 0, 6 * sizeof(void*));
        thread.stack_pointer = top - 8;
        thread.state = State::READY;
        thread.number = number;
        thread.warp = &warp;
        thread.waits_in = nullptr;
        thread.copies.clear();
        thread.groups = 0;
        thread.awaited = thread.early = false;
    }
}

static void run_block(Machine& m) {
    prepare(m);
    std::uint32_t warps = (m.threads + LANES - 1) / LANES;
    while (m.live > 0) {
        bool moved = false;
        for (std::uint32_t w = 0; w < warps; w++) {
            Warp& warp = m.warps[m.backward ? warps - 1 - w : w];
            for (bool again = true; again;) {
                again = false;
                for (std::uint32_t l = 0; l < warp.count; l++) {
                    Thread& thread = m.fibers[warp.first + (m.backward ? warp.count - 1 - l : l)];
                    if (thread.state != State::READY) continue;
                    moved = again = true;
                    m.current = &thread;
                    threadIdx = {thread.number, 0, 0};
                    baton_switch(&m.scheduler, thread.stack_pointer);
                    if (m.failed) return;
                }
            }
        }
        if (!moved) return report_divergence(m);
    }
    m.current = nullptr;
}

static void run_grid(Machine& m) {
    std::uint64_t blocks = (std::uint64_t)m.grid.x * m.grid.y * m.grid.z;
    for (std::uint64_t i = 0; i < blocks && !m.failed; i++) {
        std::uint64_t number = m.backward ? blocks - 1 - i : i;
        m.block = {(std::uint32_t)(number % m.grid.x), (std::uint32_t)(number / m.grid.x % m.grid.y),
                   (std::uint32_t)(number / m.grid.x / m.grid.y)};
        blockIdx = m.block;
        run_block(m);
    }
}

// A guard page was touched: reported as any other error. What no kernel did is somebody else's.
static struct sigaction others;
static void on_fault(int signal, siginfo_t* info, void* context) {
    Machine* m = machine;
    if (!m || !m->current) {
        if (others.sa_flags & SA_SIGINFO) return others.sa_sigaction(signal, info, context);
        sigaction(signal, &others, nullptr);
        return;
    }
    std::ptrdiff_t offset = (std::uint8_t*)info->si_addr - m->shared;
    std::ptrdiff_t near = (std::ptrdiff_t)(m->shared_bytes + 2 * PAGE);
    if (offset > -near && offset < near)
        report(*m, "touches offset %td of %zu bytes of shared memory", offset, m->shared_bytes);
    else
        report(*m, "touches %p, not by `load` or `store`", info->si_addr);
    siglongjmp(m->escape, 1);
}
static void watch_for_faults() {
    static const int once = [] {
        struct sigaction action = {};
        action.sa_sigaction = on_fault;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK;
        return sigaction(SIGSEGV, &action, &others);
    }();
    (void)once;
}

extern "C" {

// A machine with nothing in its memory.
Machine* baton_open() { return new Machine; }

void baton_close(Machine* m) {
    for (auto& [base, allocation] : m->memory) allocation.memory.unmap();
    for (std::uint8_t* stack : m->stacks) munmap(stack, STACK);
    delete m;
}

// 256-byte aligned, poisoned; 0 if there is no such memory.
std::uint64_t baton_alloc(Machine* m, std::uint64_t bytes) {
    Allocation allocation{};
    allocation.base = bytes ? allocation.memory.map(bytes, 256) : nullptr;
    if (!allocation.base) return 0;
    allocation.bytes = bytes;
    allocation.shadow.resize(bytes);
    std::memset(allocation.base, POISON, bytes);
    std::uintptr_t at = (std::uintptr_t)allocation.base;
    m->memory.emplace(at, std::move(allocation));
    return at;
}

// Whether there was such an allocation.
bool baton_free(Machine* m, std::uint64_t at) {
    auto found = m->memory.find(at);
    if (found == m->memory.end()) return false;
    found->second.memory.unmap();
    m->memory.erase(found);
    m->latest = nullptr;
    return true;
}

std::uint64_t baton_allocations(Machine* m) { return m->memory.size(); }

// Whether all of a range is in one allocation. With `written`, it counts as stored to from now on.
bool baton_range(Machine* m, std::uint64_t at, std::uint64_t bytes, bool written) {
    Allocation* in = m->find(at, bytes);
    if (!in) return false;
    std::uint8_t* shadow = in->shadow.data() + (at - (std::uintptr_t)in->base);
    for (std::uint64_t i = 0; written && i < bytes; i++) shadow[i] |= WRITTEN_EVER;
    return true;
}

// How often the last launch stored to a byte of a range: least and most often.
bool baton_writes(Machine* m, std::uint64_t at, std::uint64_t bytes, std::uint32_t* least, std::uint32_t* most) {
    Allocation* in = m->find(at, bytes);
    if (!in || !bytes) return false;
    const std::uint8_t* shadow = in->shadow.data() + (at - (std::uintptr_t)in->base);
    *least = WRITTEN_NOW;
    *most = 0;
    for (std::uint64_t i = 0; i < bytes; i++) {
        std::uint32_t count = shadow[i] & WRITTEN_NOW;
        *least = std::min(*least, count);
        *most = std::max(*most, count);
    }
    return true;
}

// Most threads of a block of this kernel; 0 if there is none of this name.
std::uint32_t baton_kernel(const char* name, std::uint32_t* parameters) {
    const Known* known = kernel_named(name);
    *parameters = known ? known->parameters : 0;
    return known ? known->most_threads : 0;
}

// The n-th kernel's name, or null.
const char* baton_kernel_name(std::uint32_t number) {
    return number < sizeof KERNELS / sizeof *KERNELS ? KERNELS[number].name : nullptr;
}

// How the next launches run: threads, warps and blocks in falling order; reads of what nobody wrote an error.
void baton_mode(Machine* m, bool backward, bool strict) {
    m->backward = backward;
    m->strict = strict;
}

// Runs a kernel to its end. Otherwise `baton_error` says why not.
bool baton_launch(Machine* m, const char* name, const std::uint32_t* grid, std::uint32_t threads, std::uint32_t shared,
                  void** arguments) {
    const Known* known = kernel_named(name);
    m->current = nullptr;
    m->failed = m->overlaps = false;
    m->error.clear();
    if (!known || threads == 0 || threads > known->most_threads) {
        m->error = std::string(name) + (known ? ": a block of too many threads" : ": there is no such kernel");
        return false;
    }
    watch_for_faults();
    for (auto& [base, allocation] : m->memory) {
        if (!allocation.dirty) continue;
        for (std::uint8_t& byte : allocation.shadow) byte &= WRITTEN_EVER;
        allocation.dirty = false;
    }
    m->kernel = known->name;
    m->call = known->call;
    m->arguments = arguments;
    m->grid = {grid[0], grid[1], grid[2]};
    m->threads = threads;
    if (m->fibers.size() < threads) m->fibers.resize(threads);
    m->warps.resize((threads + LANES - 1) / LANES);
    // 128-byte aligned, as on a GPU, and not a byte longer than 127 of what was asked for.
    m->shared_bytes = shared;
    m->shared = m->shared_memory.map(shared, 128);
    if (!m->shared || !make_stacks(*m, threads)) {
        m->shared_memory.unmap();
        m->error = std::string(name) + ": the host has no memory for it";
        return false;
    }
    Machine* outer = machine;
    machine = m;
    blockDim = {threads, 1, 1};
    gridDim = m->grid;
    if (sigsetjmp(m->escape, 1) == 0) run_grid(*m);
    machine = outer;
    m->current = nullptr;
    m->shared_memory.unmap();
    m->shared = nullptr;
    return !m->failed;
}

const char* baton_error(Machine* m) { return m->error.c_str(); }

}
