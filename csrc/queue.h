// Deals independent tasks to threads, in order, one at a time: whoever is free takes the next, so that tasks of uneven
// length balance. What a task computes must not depend on who runs it; then results are the same for every thread
// count.
#pragma once

#include "kernels.h"

namespace trilby::TRILBY_LEVEL {

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t ceiling(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class Task>
static inline void deal(int64_t tasks, const Threads& threads, const Task& task) {
  struct Queue {
    const Task& task;
    int64_t next, end;
  } queue = {task, 0, tasks};
  const int64_t workers = smaller(threads.count, tasks);
  if (workers <= 1) {
    for (int64_t i = 0; i < tasks; i++) task(i);
    return;
  }
  threads.run(
      workers,
      [](int64_t, void* context) {
        Queue& shared = *static_cast<Queue*>(context);
        while (true) {
          const int64_t mine = __atomic_fetch_add(&shared.next, 1, __ATOMIC_RELAXED);
          if (mine >= shared.end) return;
          shared.task(mine);
        }
      },
      &queue);
}

}  // namespace trilby::TRILBY_LEVEL
