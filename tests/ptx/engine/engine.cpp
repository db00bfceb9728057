// Runs the bytecode of the parser: many CTAs at once, warps in turns of a seeded random scheduler,
// weak global memory, races by vector clocks. This file is what C and Python see of it.
#include "findings.hpp"
#include "scheduler.hpp"

// The compiler's C++ library is used as far as it is headers, and not linked.
void *operator new(size_t size) {
    void *memory = malloc(size);
    if (!memory)
        abort();
    return memory;
}

void operator delete(void *memory) noexcept {
    free(memory);
}

void operator delete(void *memory, size_t) noexcept {
    free(memory);
}

#ifdef _LIBCPP_VERSION
void std::__libcpp_verbose_abort(const char *format, ...) noexcept {
    va_list arguments;
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    abort();
}
#endif

struct Run {
    Machine machine;
    std::vector<Stuck> stuck;
};

struct Result { // pointers are into the run
    i32 status;
    i32 n_findings, n_stuck;
    const Finding *findings;
    const Stuck *stuck;
    const u64 *executions, *first_warp_executions, *transactions, *least_transactions; // by pc
    Counters counters;
};

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT Run *ptx_run(const Config *config, const Program *program, const Region *regions,
                    Result *result) {
    Run *run = new Run{{*config, *program, regions}, {}};
    Machine &machine = run->machine;
    result->status = machine.run();
    run->stuck = machine.stuck();
    result->n_findings = machine.findings.size();
    result->findings = machine.findings.data();
    result->n_stuck = run->stuck.size();
    result->stuck = run->stuck.data();
    result->executions = machine.executions.data();
    result->first_warp_executions = machine.first_warp_executions.data();
    result->transactions = machine.transactions.data();
    result->least_transactions = machine.least_transactions.data();
    result->counters = machine.counters;
    result->counters.instructions = machine.now;
    return run;
}

EXPORT void ptx_free(Run *run) {
    delete run;
}
