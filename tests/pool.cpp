// The pool without Python and its GIL, for ThreadSanitizer (tests/test_memory.py): threads allocate, mark what they
// got, swap it with the others' and free what they find; and a tensor dies after every other static object.
#include <atomic>
#include <cstdio>
#include <thread>
#include <vector>

#include "memory.h"

using convoxel::DLManagedTensor;

struct Last {
  DLManagedTensor* tensor = nullptr;
  ~Last() { tensor->deleter(tensor); }
} last;  // made before the pool, so destroyed after it would be

std::atomic<DLManagedTensor*> shared[4];
std::atomic<int> wrong;

int64_t length(DLManagedTensor* t) { return t->tensor.shape[0] / 8; }

DLManagedTensor* make(int64_t mark) {
  DLManagedTensor* t = convoxel::new_tensor({1, 64, 1}, {(mark % 5 + 1) << 16}, {1});
  int64_t* data = static_cast<int64_t*>(t->tensor.data);
  for (int64_t i : {int64_t(0), length(t), t->tensor.shape[0] - 1}) data[i] = mark;
  return t;
}

void check_and_free(DLManagedTensor* t) {
  const int64_t* data = static_cast<int64_t*>(t->tensor.data);
  wrong += data[0] != data[length(t)] || data[0] != data[t->tensor.shape[0] - 1] ||
           (data[0] % 5 + 1) << 16 != t->tensor.shape[0];
  t->deleter(t);
}

void work(int me) {
  for (int i = 0; i < 3000; ++i) {
    DLManagedTensor* mine = make(me * 100000 + i);
    if (DLManagedTensor* other = shared[i % 4].exchange(mine)) check_and_free(other);
    if (i % 500 == me) convoxel::release_memory();
    if (i % 500 == 100 + me) convoxel::set_memory_limit(int64_t(me) << 20);
    wrong += convoxel::memory_statistics().held < 0;
  }
}

int main() {
  last.tensor = make(1);
  std::vector<std::thread> threads;
  for (int me = 0; me < 4; ++me) threads.emplace_back(work, me);
  for (std::thread& t : threads) t.join();
  for (auto& s : shared) check_and_free(s);
  convoxel::MemoryStatistics s = convoxel::memory_statistics();
  std::printf("wrong %d, blocks in use %d, reused %s\n", wrong.load(), int(s.in_use / (2 << 19)),
              s.reused > 100 ? "yes" : "no");
}
