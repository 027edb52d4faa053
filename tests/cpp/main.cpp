// main -- runs the tests on one ISA level: cpp_tests --isa=v3. Without the option, the tests run on
// the best level of this CPU. Exits with 77 if this CPU or this build lacks the level.
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
    const auto level = levels.find(argument.substr(argument.find('=') + 1));
    if (argument.rfind("--isa=", 0) != 0 || level == levels.end()) {
      std::cerr << "cpp_tests: unknown argument " << argument << "\n";
      return 2;
    }
    if (!vmoe::cpu::use_isa(level->second)) {
      std::cerr << "cpp_tests: this CPU or this build lacks the level " << level->first << "\n";
      return 77;
    }
  }
  for (const auto& [name, level] : levels) {
    if (level == vmoe::cpu::isa()) std::cout << "ISA level " << name << "\n";
  }
  return RUN_ALL_TESTS();
}
