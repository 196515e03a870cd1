// A test harness of one header: CHECK and CHECK_EQ, and TEST to register a function.
//
//   TEST(pool_hands_out_in_order) { CHECK_EQ(pool.Pop(), 0); }
//
// Include it in one .cc per program; it defines main(). A program takes [filter] [seed]: it runs the
// tests whose name contains the filter, fails if there are none, and prints the seed that
// test::Random draws from, so that a failure can be repeated.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <random>
#include <sstream>
#include <string>
#include <type_traits>
#include <vector>

namespace test {

struct Case {
  const char* name;
  void (*run)();
};

inline std::vector<Case>& Cases() {
  static std::vector<Case> cases;
  return cases;
}

struct Registration {
  Registration(const char* name, void (*run)()) { Cases().push_back({name, run}); }
};

// Thrown by a failed check: it ends the test, not the program.
struct Failure {
  std::string message;
};

inline uint64_t& Seed() {
  static uint64_t seed = 1;
  return seed;
}

// A generator that differs from test to test and repeats with the seed.
inline std::mt19937_64 Random(uint64_t stream = 0) { return std::mt19937_64(Seed() * 1000003 + stream); }

template <typename T>
std::string Show(const T& value) {
  std::ostringstream out;
  if constexpr (requires { out << value; }) {
    out << value;
  } else if constexpr (std::is_enum_v<T>) {
    out << static_cast<long long>(value);
  } else {
    out << "(" << sizeof(T) << " bytes)";
  }
  return out.str();
}

[[noreturn]] inline void Fail(const char* file, int line, const std::string& what) {
  throw Failure{std::string(file) + ":" + std::to_string(line) + ": " + what};
}

template <typename A, typename B>
void CheckEqual(const A& a, const B& b, const char* text, const char* file, int line) {
  if (!(a == b)) Fail(file, line, std::string(text) + ": " + Show(a) + " != " + Show(b));
}

inline int Main(int argc, char** argv) {
  const char* filter = argc > 1 ? argv[1] : "";
  Seed() = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
  int num_run = 0;
  int num_failed = 0;
  for (const Case& test : Cases()) {
    if (!std::strstr(test.name, filter)) continue;
    ++num_run;
    std::string failure;
    try {
      test.run();
    } catch (const Failure& caught) {
      failure = caught.message;
    } catch (const std::exception& caught) {
      failure = std::string("exception: ") + caught.what();
    }
    num_failed += !failure.empty();
    std::printf("%s %s%s%s\n", failure.empty() ? "ok  " : "FAIL", test.name, failure.empty() ? "" : "\n     ",
                failure.c_str());
    std::fflush(stdout);
  }
  std::printf("%d run, %d failed, seed %llu\n", num_run, num_failed, static_cast<unsigned long long>(Seed()));
  if (num_run == 0) std::fprintf(stderr, "no test matches '%s'\n", filter);
  return num_run == 0 || num_failed > 0;
}

}  // namespace test

#define TEST(name)                                                     \
  static void Test_##name();                                           \
  static const test::Registration register_##name(#name, Test_##name); \
  static void Test_##name()

#define CHECK(condition)                                                  \
  do {                                                                    \
    if (!(condition)) test::Fail(__FILE__, __LINE__, "not: " #condition); \
  } while (false)

#define CHECK_EQ(a, b) test::CheckEqual((a), (b), #a " == " #b, __FILE__, __LINE__)

int main(int argc, char** argv) { return test::Main(argc, argv); }
