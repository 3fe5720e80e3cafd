// The pool of blocks that outputs and scratch live in, and the tensors that carry them away.
#pragma once

#include <cstdint>
#include <vector>

namespace convoxel {

// DLPack's ABI (dmlc/dlpack, dlpack.h, the unversioned tensor that every torch takes): how a block becomes a tensor
// of torch without csrc knowing torch.
struct DLDevice {
  int32_t type, id;  // 1: CPU
};
struct DLDataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct DLManagedTensor {
  DLTensor tensor;
  void* context;
  void (*deleter)(DLManagedTensor*);  // called once, from any thread, with or without Python
};

struct MemoryStatistics {
  int64_t in_use, held, peak, limit;  // bytes: of tensors' blocks, of free blocks; most that was asked for at once
  int64_t allocations, reused;
};

// Not initialised; the strides, in elements, are dense. std::bad_alloc says how much was wanted and in use.
DLManagedTensor* new_tensor(DLDataType dtype, const std::vector<int64_t>& shape, const std::vector<int64_t>& strides);

// Gives all free blocks back to the system, and counts the peak from now on; returns their bytes.
int64_t release_memory();
void set_memory_limit(int64_t bytes);
MemoryStatistics memory_statistics();

}  // namespace convoxel
