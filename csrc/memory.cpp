// The pool, and the one file that allocates. Memory that is fresh from the system costs a page fault every 4 KiB: for
// a volume's worth as much time as the convolution that fills it, and glibc gives every large block back when it is
// freed. Here a freed block waits for the next tensor of about its size:
//   - best fit: the smallest free block that holds the request and is at most twice it, else a new one (sizes of a
//     U-Net differ by powers of two: at 1.5 times, a step of nnU-Net 3D took 17 new blocks, now none);
//   - bounded: free blocks go back, least recently used first, while they exceed the limit, or while blocks free and
//     in use together exceed 1.25 times the most that tensors asked for at once. (Classes of sizes, without such a
//     rule, grew to 7 times the live memory on random sizes.)
// Blocks come straight from the system, in huge pages, and where those are in use a free block is marked as one that
// the kernel may take when it runs short of memory.
#include "memory.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <string>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>
#define CONVOXEL_HAS_MMAP
#else
#include <malloc.h>
#endif

namespace convoxel {
namespace {

constexpr int64_t kHuge = int64_t(2) << 20;
constexpr int64_t kGrain = int64_t(64) << 10;  // a multiple of every system's page

struct Block {
  char* data;
  int64_t bytes;   // of the block
  int64_t wanted;  // of the tensor in it
};

// The system's side ---------------------------------------------------------------------------------

#ifdef CONVOXEL_HAS_MMAP

int64_t machine_memory() { return int64_t(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE); }

char* map(int64_t bytes) {
  void* p = mmap(nullptr, bytes + kHuge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) return nullptr;
  char* start = static_cast<char*>(p);
  int64_t before = -reinterpret_cast<intptr_t>(p) & (kHuge - 1);
  if (before) munmap(start, before);
  munmap(start + before + bytes, kHuge - before);
#ifdef MADV_HUGEPAGE
  madvise(start + before, bytes, MADV_HUGEPAGE);
#endif
  return start + before;
}

void unmap(const Block& b) { munmap(b.data, b.bytes); }

// Whether marking memory as free costs nothing: 0.06 ms for 113 MB in huge pages, but 13 ms in small ones (with what
// their next use then takes), a third of fresh memory's price.
bool has_huge_pages() {
  char line[64] = "[never]";
  if (FILE* f = std::fopen("/sys/kernel/mm/transparent_hugepage/enabled", "r")) {
    if (!std::fgets(line, sizeof line, f)) line[0] = 0;
    std::fclose(f);
  }
  return std::string(line).find("[never]") == std::string::npos;
}

void let_go_when_short([[maybe_unused]] const Block& b) {
#if defined(MADV_FREE) && defined(MADV_HUGEPAGE)
  static const bool cheap = has_huge_pages();
  if (cheap) madvise(b.data, b.bytes, MADV_FREE);
#endif
}

#else

int64_t machine_memory() { return int64_t(8) << 30; }
char* map(int64_t bytes) { return static_cast<char*>(_aligned_malloc(size_t(bytes), 64)); }
void unmap(const Block& b) { _aligned_free(b.data); }
void let_go_when_short(const Block&) {}

#endif

// The pool ------------------------------------------------------------------------------------------

struct OutOfMemory : std::bad_alloc {
  std::string message;
  OutOfMemory(int64_t wanted, int64_t in_use)
      : message("can't allocate memory: " + std::to_string(wanted) + " bytes wanted, " + std::to_string(in_use) +
                " in use by convoxel's tensors, none held in reserve") {}
  const char* what() const noexcept override { return message.c_str(); }
};

class Pool {
 public:
  Block take(int64_t wanted) {
    if (wanted > int64_t(1) << 60) throw OutOfMemory(wanted, statistics().in_use);  // beyond every address space
    Block block = {nullptr, (wanted + kGrain - 1) / kGrain * kGrain, wanted};
    if (reuse(block)) return block;
    block.data = map(block.bytes);
    if (!block.data) {
      release();
      block.data = map(block.bytes);
    }
    if (!block.data) throw OutOfMemory(wanted, statistics().in_use);
    std::vector<Block> extra;
    {
      Lock lock(mutex_);
      hand_out(block);
      extra = surplus();
    }
    unmap_all(extra);
    return block;
  }

  void give(const Block& block) {
    let_go_when_short(block);
    std::vector<Block> extra;
    {
      Lock lock(mutex_);
      in_use_ -= block.bytes;
      wanted_ -= block.wanted;
      held_ += block.bytes;
      free_.push_back(block);
      extra = surplus();
    }
    unmap_all(extra);
  }

  int64_t release() {
    std::vector<Block> all;
    int64_t bytes;
    {
      Lock lock(mutex_);
      all.swap(free_);
      bytes = held_;
      held_ = 0;
      peak_ = wanted_;
    }
    unmap_all(all);
    return bytes;
  }

  void set_limit(int64_t bytes) {
    std::vector<Block> extra;
    {
      Lock lock(mutex_);
      limit_ = bytes;
      extra = surplus();
    }
    unmap_all(extra);
  }

  MemoryStatistics statistics() {
    Lock lock(mutex_);
    return {in_use_, held_, peak_, limit_, allocations_, reused_};
  }

  // Around a fork. The child gets no free blocks: shared until written, each would cost this process a copy, and
  // stay with the child for good.
  void before_fork() {
    mutex_.lock();
    inherit_free(false);
  }
  void after_fork_in_parent() {
    inherit_free(true);
    mutex_.unlock();
  }
  void after_fork_in_child() {
#ifdef MADV_DONTFORK
    free_.clear();
    held_ = 0;
#endif
    mutex_.unlock();
  }

 private:
  typedef std::lock_guard<std::mutex> Lock;

  // Takes the best free block, the latest of several as good: it is the likeliest to be in a cache.
  bool reuse(Block& block) {
    Lock lock(mutex_);
    auto best = free_.end();
    for (auto b = free_.begin(); b != free_.end(); ++b) {
      bool fits = b->bytes >= block.bytes && b->bytes <= 2 * block.bytes;
      if (fits && (best == free_.end() || b->bytes <= best->bytes)) best = b;
    }
    if (best == free_.end()) return false;
    block.data = best->data;
    block.bytes = best->bytes;
    free_.erase(best);
    held_ -= block.bytes;
    ++reused_;
    hand_out(block);
    return true;
  }

  void hand_out(const Block& block) {
    in_use_ += block.bytes;
    wanted_ += block.wanted;
    peak_ = std::max(peak_, wanted_);
    ++allocations_;
  }

  // What the rule no longer allows; the caller unmaps it, without the lock: that takes milliseconds.
  std::vector<Block> surplus() {
    std::vector<Block> extra;
    auto b = free_.begin();
    for (; b != free_.end() && (held_ > limit_ || held_ + in_use_ > peak_ + peak_ / 4); ++b) {
      held_ -= b->bytes;
      extra.push_back(*b);
    }
    free_.erase(free_.begin(), b);
    return extra;
  }

  static void unmap_all(const std::vector<Block>& blocks) {
    for (const Block& b : blocks) unmap(b);
  }

  void inherit_free([[maybe_unused]] bool inherit) {
#ifdef MADV_DONTFORK
    for (const Block& b : free_) madvise(b.data, b.bytes, inherit ? MADV_DOFORK : MADV_DONTFORK);
#endif
  }

  std::mutex mutex_;
  std::vector<Block> free_;  // least recently used first
  int64_t in_use_ = 0, held_ = 0, limit_ = machine_memory() / 2;
  int64_t wanted_ = 0, peak_ = 0;  // as tensors asked for it
  int64_t allocations_ = 0, reused_ = 0;
};

// Never destroyed: tensors outlive every static object.
Pool& pool() {
  static Pool* const one = [] {
    Pool* p = new Pool;
#ifdef CONVOXEL_HAS_MMAP
    pthread_atfork([] { pool().before_fork(); }, [] { pool().after_fork_in_parent(); },
                   [] { pool().after_fork_in_child(); });
#endif
    return p;
  }();
  return *one;
}

struct Owned {
  DLManagedTensor managed;
  Block block;
  std::vector<int64_t> shape, strides;
};

}  // namespace

DLManagedTensor* new_tensor(DLDataType dtype, const std::vector<int64_t>& shape, const std::vector<int64_t>& strides) {
  int64_t bytes = dtype.bits / 8;
  for (int64_t n : shape) bytes *= n;
  auto owned = std::make_unique<Owned>(Owned{{}, {}, shape, strides});
  owned->block = pool().take(bytes);
  Owned& o = *owned;
  o.managed.tensor = {o.block.data, {1, 0}, int32_t(shape.size()), dtype, o.shape.data(), o.strides.data(), 0};
  o.managed.context = owned.release();
  o.managed.deleter = [](DLManagedTensor* t) {
    std::unique_ptr<Owned> mine(static_cast<Owned*>(t->context));
    pool().give(mine->block);
  };
  return &o.managed;
}

int64_t release_memory() { return pool().release(); }
void set_memory_limit(int64_t bytes) { pool().set_limit(bytes); }
MemoryStatistics memory_statistics() { return pool().statistics(); }

}  // namespace convoxel
