// main -- runs the tests of the CUDA kernels. On the emulator, --schedule sets the order in which
// the threads of a block and the blocks of a grid run. The order is forward (the default), backward
// or shuffled.
#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <iostream>
#include <string>

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
#ifdef VMOE_SHIM
    if (argument == "--schedule=forward") continue;
    if (argument == "--schedule=backward") {
      shim::schedule = shim::Schedule::kBackward;
      continue;
    }
    if (argument == "--schedule=shuffled") {
      shim::schedule = shim::Schedule::kShuffled;
      continue;
    }
#endif
    std::cerr << "cuda_tests: unsupported argument " << argument << "\n";
    return 2;
  }
  return RUN_ALL_TESTS();
}
