// buffer -- scratch memory of a CPU kernel.
#pragma once

#include <cstdint>
#include <memory>
#include <new>
#include <type_traits>

namespace vmoe::cpu {

// Uninitialised items, aligned to a cache line.
template <typename Item>
class Buffer {
  static_assert(std::is_trivially_copyable_v<Item> && std::is_trivially_destructible_v<Item>);

 public:
  Buffer() = default;
  explicit Buffer(int64_t size) { make(size); }

  // Makes room for `size` items. Memory that is large enough is kept, with its values.
  void make(int64_t size) {
    if (size <= size_) return;
    items_.reset(new (kCacheLine) Item[size]);
    size_ = size;
  }

  Item* get() const { return items_.get(); }
  Item& operator[](int64_t i) const { return items_[i]; }

 private:
  static constexpr std::align_val_t kCacheLine{64};
  struct Delete {
    void operator()(Item* items) const { operator delete[](items, kCacheLine); }
  };

  std::unique_ptr<Item[], Delete> items_;
  int64_t size_ = 0;
};

}  // namespace vmoe::cpu
