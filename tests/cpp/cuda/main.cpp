// main -- runs the tests of the CUDA kernels, on the host with --schedule=forward (as without it),
// backward or shuffled: the order in which a block's threads and a grid's blocks run.
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
    std::cerr << "cuda_tests: cannot run with " << argument << "\n";
    return 2;
  }
  return RUN_ALL_TESTS();
}
