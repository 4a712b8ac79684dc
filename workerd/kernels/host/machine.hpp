// The machine that kernels run on when there is no GPU: memory whose every access is checked, and blocks whose threads
// are fibers of one host thread. A fiber runs until it meets others (barrier, shuffle, `mma`) or ends; who arrives last
// does the work of all. Threads run in either order: a result that depends on it misses a barrier.
#pragma once

#include <csetjmp>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include <sys/mman.h>

namespace host {

const std::size_t PAGE = 4096, STACK = 64 << 10, LANES = 32;
const int POISON = 0xff;  // Not a number, whatever it is read as.

// Where in the sources something is asked for. As the last parameters, SITE is where the caller is; HERE hands it on.
struct Site {
    const char* file;
    int line;
    const char* name() const {
        const char* slash = std::strrchr(file, '/');
        return slash ? slash + 1 : file;
    }
};
#define SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define HERE host::Site{file, line}

struct Triple {
    std::uint32_t x, y, z;
};

// Pages between two that nobody may touch; what lies in them ends right before the second.
struct Guarded {
    std::uint8_t* pages = nullptr;
    std::size_t length = 0;

    std::uint8_t* map(std::size_t bytes, std::size_t alignment) {
        std::size_t inner = (bytes + alignment + PAGE - 1) / PAGE * PAGE;
        void* at = mmap(nullptr, inner + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (at == MAP_FAILED) return nullptr;
        pages = (std::uint8_t*)at;
        length = inner + 2 * PAGE;
        mprotect(pages + PAGE, inner, PROT_READ | PROT_WRITE);
        return pages + PAGE + (inner - bytes) / alignment * alignment;
    }
    void unmap() {
        if (pages) munmap(pages, length);
        pages = nullptr;
    }
};

// A piece of device memory. Of each byte is known whether anything was ever put there, and how often the running (or
// last) kernel stored to it.
struct Allocation {
    Guarded memory;
    std::uint8_t* base;
    std::size_t bytes;
    std::vector<std::uint8_t> shadow;
    bool dirty;     // By the running kernel, or the last.
    bool changing;  // By any kernel: not constant.
};
const std::uint8_t WRITTEN_EVER = 0x80, WRITTEN_NOW = 0x7f;

// What threads meet for.
enum class Meeting { BARRIER, SYNC_WARP, SHUFFLE, LOAD_MATRIX, LOAD_MATRIX_TRANSPOSED, MMA };
inline const char* name(Meeting meeting) {
    switch (meeting) {
        case Meeting::BARRIER: return "sync_block";
        case Meeting::SYNC_WARP: return "sync_warp";
        case Meeting::SHUFFLE: return "shuffle";
        case Meeting::LOAD_MATRIX: return "load_matrix";
        case Meeting::LOAD_MATRIX_TRANSPOSED: return "load_matrix_transposed";
        default: return "mma";
    }
}

// Threads that meet: a warp's, or a block's.
struct Group {
    std::uint32_t first, count, arrived;
    Meeting meeting;
    Site site;
};

struct Warp : Group {
    std::uint64_t given[LANES], taken[LANES];
    std::uint32_t fragments[LANES][6];
    void* at[LANES];
    const void* rows[LANES];
};

// A copy under way: nobody may rely on what is at `to` before its group was waited for.
struct Copy {
    std::uint8_t* to;
    const std::uint8_t* from;
    bool wanted;
    std::uint32_t group;
};

enum class State { READY, WAITING, DONE };

struct Thread {
    void* stack_pointer;
    State state;
    std::uint32_t number;
    Warp* warp;
    Group* waits_in;
    std::vector<Copy> copies;
    std::uint32_t groups;  // Of copies, committed.
    bool awaited;          // The kernel before.
    bool early;            // It touched what is not constant before that,
    Site early_at;         // first here.
};

struct Machine;
extern thread_local Machine* machine;
using Call = void (*)(void** arguments);

extern "C" void baton_switch(void** from, void* to);

struct Machine {
    std::map<std::uintptr_t, Allocation> memory;
    Allocation* latest = nullptr;
    std::string error;
    bool backward = false, strict = true;

    // Of the running kernel.
    const char* kernel = "";
    Call call = nullptr;
    void** arguments = nullptr;
    Triple grid{}, block{};
    std::uint32_t threads = 0, live = 0;
    bool failed = false, overlaps = false;
    Guarded shared_memory;
    std::uint8_t* shared = nullptr;
    std::size_t shared_bytes = 0;

    std::vector<Thread> fibers;
    std::vector<std::uint8_t*> stacks;
    std::vector<Warp> warps;
    Group all{};
    Thread* current = nullptr;
    void* scheduler = nullptr;
    sigjmp_buf escape;

    // Ends the kernel. From a fiber; never returns.
    [[noreturn]] void fail(Site site, const char* format, ...) __attribute__((format(printf, 3, 4))) {
        va_list rest;
        va_start(rest, format);
        report(&site, format, rest);
        va_end(rest);
        baton_switch(&current->stack_pointer, scheduler);
        __builtin_unreachable();
    }
    void report(const Site* site, const char* format, va_list rest) {
        char what[512], where[160];
        std::vsnprintf(what, sizeof what, format, rest);
        int length = std::snprintf(where, sizeof where, "%s: block (%u, %u, %u)", kernel, block.x, block.y, block.z);
        if (current) length += std::snprintf(where + length, sizeof where - length, ", thread %u", current->number);
        if (site) std::snprintf(where + length, sizeof where - length, ", %s:%d", site->name(), site->line);
        error = std::string(where) + ": " + what;
        failed = true;
    }

    // The allocation that holds all of a range, or none.
    Allocation* find(std::uintptr_t at, std::size_t bytes) {
        if (!latest || at < (std::uintptr_t)latest->base || at >= (std::uintptr_t)latest->base + latest->bytes) {
            auto after = memory.upper_bound(at);
            if (after == memory.begin()) return nullptr;
            latest = &std::prev(after)->second;
        }
        std::uintptr_t base = (std::uintptr_t)latest->base;
        return at >= base && bytes <= latest->bytes && at - base <= latest->bytes - bytes ? latest : nullptr;
    }

    // The allocation that a thread reads or writes in.
    Allocation& access(const void* pointer, std::size_t bytes, std::size_t alignment, const char* verb, Site site) {
        std::uintptr_t at = (std::uintptr_t)pointer;
        if (at % alignment) fail(site, "%s of %zu bytes at %p, which is not aligned", verb, bytes, pointer);
        if (Allocation* found = find(at, bytes)) return *found;
        if (shared && pointer >= shared && pointer < shared + shared_bytes)
            fail(site, "%s of %zu bytes at %p: this is shared memory", verb, bytes, pointer);
        auto after = memory.upper_bound(at);
        if (after == memory.begin()) fail(site, "%s of %zu bytes at %p: no memory there", verb, bytes, pointer);
        Allocation& before = std::prev(after)->second;
        fail(site, "%s of %zu bytes at %p: offset %zu of an allocation of %zu bytes", verb, bytes, pointer,
             (std::size_t)(at - (std::uintptr_t)before.base), before.bytes);
    }
    void check_read(const void* pointer, std::size_t bytes, std::size_t alignment, Site site) {
        Allocation& in = access(pointer, bytes, alignment, "load", site);
        if (in.changing) check_awaited(site);
        if (!strict) return;
        const std::uint8_t* shadow = in.shadow.data() + ((const std::uint8_t*)pointer - in.base);
        for (std::size_t i = 0; i < bytes; i++)
            if (!(shadow[i] & WRITTEN_EVER))
                fail(site, "load of %zu bytes at %p: nothing was ever stored there (offset %zu of %zu)", bytes, pointer,
                     (std::size_t)((const std::uint8_t*)pointer - in.base), in.bytes);
    }
    void count_write(void* pointer, std::size_t bytes, std::size_t alignment, Site site) {
        Allocation& in = access(pointer, bytes, alignment, "store", site);
        check_awaited(site);
        std::uint8_t* shadow = in.shadow.data() + ((std::uint8_t*)pointer - in.base);
        in.dirty = in.changing = true;
        for (std::size_t i = 0; i < bytes; i++) {
            if ((shadow[i] & WRITTEN_NOW) < WRITTEN_NOW) shadow[i]++;
            shadow[i] |= WRITTEN_EVER;
        }
    }
    void check_add(void* pointer, std::size_t bytes, Site site) {
        check_read(pointer, bytes, bytes, site);
        check_awaited(site);
        access(pointer, bytes, bytes, "add", site).changing = true;
    }
    // A kernel that may begin before the one before it has ended touches only constants until it has waited for that.
    void check_awaited(Site site) {
        if (current->awaited || current->early) return;
        current->early = true;
        current->early_at = site;
    }
    void await() {
        overlaps = true;
        if (current->early) fail(current->early_at, "before `await_previous`");
        current->awaited = true;
    }
    void check_shared(const void* pointer, std::size_t bytes, std::size_t alignment, const char* verb, Site site) {
        const std::uint8_t* at = (const std::uint8_t*)pointer;
        if ((std::uintptr_t)at % alignment) fail(site, "%s at %p, which is not aligned", verb, pointer);
        if (at < shared || at > shared + shared_bytes || bytes > (std::size_t)(shared + shared_bytes - at))
            fail(site, "%s of %zu bytes at offset %td of %zu bytes of shared memory", verb, bytes, at - shared, shared_bytes);
    }

    // Waits for all of a group; the last one does `work` for all.
    template <class Work> void meet(Group& group, Meeting meeting, Site site, Work work) {
        if (group.arrived == 0) {
            group.meeting = meeting;
            group.site = site;
        } else if (group.meeting != meeting || group.site.line != site.line || std::strcmp(group.site.file, site.file)) {
            fail(site, "%s, while others of the %s are at %s (%s:%d)", name(meeting), &group == &all ? "block" : "warp",
                 name(group.meeting), group.site.name(), group.site.line);
        }
        if (++group.arrived < group.count) {
            current->state = State::WAITING;
            current->waits_in = &group;
            leave();
            return;
        }
        work();
        group.arrived = 0;
        for (std::uint32_t i = 0; i < group.count; i++) fibers[group.first + i].state = State::READY;
    }
    // To the scheduler; returns when it is this fiber's turn again.
    void leave() { baton_switch(&current->stack_pointer, scheduler); }

    Warp& warp() { return *current->warp; }
    std::uint32_t lane() { return current->number % LANES; }
};

}  // namespace host
