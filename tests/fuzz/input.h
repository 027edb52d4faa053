// input -- sizes and buffers from the bytes that libFuzzer gives.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>

namespace vmoe {

namespace kernels = cpu::VMOE_ISA;  // the level that is fuzzed

inline void expect(bool holds) {
  if (!holds) __builtin_trap();
}

// A block of exactly `size` entries, so that AddressSanitizer sees an access beside it.
template <typename T>
class Block {
 public:
  explicit Block(int64_t size) : size_(size), entries_(new T[size]()) {}
  operator T*() { return entries_.get(); }
  T* data() { return entries_.get(); }
  int64_t size() const { return size_; }
  T* begin() { return entries_.get(); }
  T* end() { return entries_.get() + size_; }

 private:
  int64_t size_;
  std::unique_ptr<T[]> entries_;
};

class Input {
 public:
  Input(const uint8_t* data, size_t size) : data_(data), size_(size) {}

  uint8_t byte() { return size_ ? data_[at_++ % size_] : 0; }
  bool flag() { return byte() & 1; }
  int64_t integer(int64_t low, int64_t high) {  // in [low, high], high - low < 256
    return low + byte() % (high - low + 1);
  }

  // Floating-point entries: any bits, or few values that tie, or values with a wide exponent. Other
  // entries: any bits, or small integers.
  template <typename T>
  Block<T> values(int64_t size) {
    Block<T> block(size);
    const int kind = byte() % 3;
    for (T& entry : block) {
      if (kind == 0) {
        uint8_t bits[sizeof(T)];
        for (uint8_t& bit : bits) bit = byte();
        memcpy(&entry, bits, sizeof(T));
      } else if constexpr (std::is_floating_point_v<T>) {
        const T value = static_cast<T>(static_cast<int8_t>(byte()) / 8);
        entry = kind == 1 ? value : std::ldexp(value, 4 * static_cast<int8_t>(byte()));
      } else {
        entry = static_cast<T>(static_cast<int8_t>(byte()));
      }
    }
    return block;
  }

 private:
  const uint8_t* data_;
  size_t size_, at_ = 0;
};

}  // namespace vmoe

// Defines the target: body(Input&, T{}) with T = float or double.
#define VMOE_FUZZ(body)                                                                            \
  extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {                        \
    vmoe::Input input(data, size);                                                                 \
    input.flag() ? vmoe::body(input, float{}) : vmoe::body(input, double{});                       \
    return 0;                                                                                      \
  }
