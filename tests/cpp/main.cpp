// main -- runs the tests on one ISA level: cpp_tests --isa=v3. Without it, on the best of
// this CPU; --list-isas prints the levels that can be asked for.
#include <gtest/gtest.h>

#include <iostream>
#include <map>
#include <string>

#include "common/isa.h"

int main(int argc, char** argv) {
  using vmoe::cpu::Isa;
  const std::map<std::string, Isa> levels{
      {"base", Isa::kBase}, {"v2", Isa::kV2}, {"v3", Isa::kV3}, {"v4", Isa::kV4}};
  testing::InitGoogleTest(&argc, argv);
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--list-isas") {
      for (const auto& [name, level] : levels) {
        if (vmoe::cpu::use_isa(level)) std::cout << name << "\n";
      }
      return 0;
    }
    const auto level = levels.find(argument.substr(argument.find('=') + 1));
    if (argument.rfind("--isa=", 0) != 0 || level == levels.end() ||
        !vmoe::cpu::use_isa(level->second)) {
      std::cerr << "cpp_tests: cannot run with " << argument << " here\n";
      return 2;
    }
  }
  for (const auto& [name, level] : levels) {
    if (level == vmoe::cpu::isa()) std::cout << "ISA level " << name << "\n";
  }
  return RUN_ALL_TESTS();
}
