// The tile unit (AMX) in software, for processors without one: preloaded (LD_PRELOAD) into a process, it stands behind
// the instructions themselves. They raise SIGILL there; the handler decodes and computes them, and the thread goes on.
// So what is tested is the machine code that is shipped, down to addresses and registers, and not a model of its
// source.
//
// While pretend(1) holds on a thread, CPUID there says that the processor has tiles (Linux makes CPUID fault on
// demand), and the kernel's permission to use them is answered here. TILE_UNIT in the environment makes trouble:
// "refused", "wrong".
//
// Semantics by Intel's Software Developer's Manual, TDPBF16PS: products of the even and the odd numbers of the pairs
// are summed apart, by fused multiply-adds that round to nearest even and take and leave subnormals as 0, then added to
// one another and to the sum.
#include <immintrin.h>
#include <signal.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include <cerrno>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

typedef float Row __attribute__((vector_size(64)));
typedef uint32_t Pairs __attribute__((vector_size(64)));

struct Tile {
  alignas(64) unsigned char rows[16][64];
};

struct Unit {
  bool configured = false;
  uint16_t bytes_of_row[8];
  uint8_t rows[8];
  Tile tiles[8];
};

thread_local Unit unit;
long multiplied = 0;

[[noreturn]] void give_up(const char* why) {
  std::fprintf(stderr, "tile unit: %s\n", why);
  std::abort();
}

bool trouble(const char* what) {
  const char* wanted = std::getenv("TILE_UNIT");
  return wanted && std::strcmp(wanted, what) == 0;
}

long raw_syscall(long number, long a, long b, long c, long d, long e, long f) {
  long result;
  register long r10 asm("r10") = d;
  register long r8 asm("r8") = e;
  register long r9 asm("r9") = f;
  asm volatile("syscall"
               : "=a"(result)
               : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
               : "rcx", "r11", "memory");
  return result;
}

constexpr long ARCH_SET_CPUID = 0x1012, ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;

bool cpuid_faults(bool does) { return raw_syscall(SYS_arch_prctl, ARCH_SET_CPUID, !does, 0, 0, 0, 0) == 0; }

// In the order in which instructions number them.
int64_t register_of(const ucontext_t* context, int number) {
  static const int ORDER[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                              REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  return context->uc_mcontext.gregs[ORDER[number]];
}

void configure(const unsigned char* from) {
  if (from[0] != 1 || from[1] != 0) give_up("only palette 1 from row 0 is known");
  for (int i = 0; i < 8; i++) {
    std::memcpy(&unit.bytes_of_row[i], from + 16 + 2 * i, 2);
    unit.rows[i] = from[48 + i];
    if (unit.rows[i] > 16 || unit.bytes_of_row[i] > 64) give_up("a tile larger than a tile is configured");
  }
  std::memset(unit.tiles, 0, sizeof unit.tiles);
  unit.configured = true;
}

__attribute__((target("avx512f"))) void multiply(int sum, int a, int b) {
  _mm_setcsr(0x1f80 | 0x8040);  // nothing trapped, to nearest even, subnormals are 0
  const int rows = unit.rows[sum], pairs = unit.rows[b];
  if (unit.bytes_of_row[a] != 4 * pairs || unit.rows[a] != rows || unit.bytes_of_row[b] != unit.bytes_of_row[sum]) {
    give_up("tiles of other sizes are multiplied");
  }
  for (int r = 0; r < rows; r++) {
    Row even = {}, odd = {};
    for (int k = 0; k < pairs; k++) {
      uint32_t pair;
      Pairs column;
      std::memcpy(&pair, unit.tiles[a].rows[r] + 4 * k, 4);
      std::memcpy(&column, unit.tiles[b].rows[k], 64);
      even = (Row)_mm512_fmadd_ps((__m512)(Pairs{} + (pair << 16)), (__m512)(column << 16), (__m512)even);
      odd = (Row)_mm512_fmadd_ps((__m512)(Pairs{} + (pair & 0xffff0000u)), (__m512)(column & 0xffff0000u), (__m512)odd);
    }
    Row total;
    std::memcpy(&total, unit.tiles[sum].rows[r], 64);
    total = total + (even + odd);
    if (trouble("wrong")) total = total + 1.0f;
    std::memcpy(unit.tiles[sum].rows[r], &total, unit.bytes_of_row[sum]);
  }
  __atomic_fetch_add(&multiplied, 1, __ATOMIC_RELAXED);
}

// The memory operand that `modrm` begins: its address but for the index, the index, which is the stride of a tile's
// rows, and the number of bytes that say so.
struct Operand {
  int64_t address, stride;
  int length;
};

Operand memory_operand(const ucontext_t* context, const unsigned char* modrm, int rex_x, int rex_b) {
  const int mod = *modrm >> 6, rm = *modrm & 7;
  const unsigned char* next = modrm + 1;
  Operand operand = {0, 0, 0};
  int base = rm;
  if (rm == 4) {
    const int sib = *next++, index = ((sib >> 3) & 7) | rex_x << 3;
    if (index != 4) operand.stride = register_of(context, index) << (sib >> 6);
    base = sib & 7;
  }
  const bool no_base = base == 5 && mod == 0;
  int32_t displacement = 0;
  if (mod == 1) {
    displacement = static_cast<int8_t>(*next++);
  } else if (mod == 2 || no_base) {
    std::memcpy(&displacement, next, 4);
    next += 4;
  }
  operand.length = static_cast<int>(next - modrm);
  if (!no_base) operand.address = register_of(context, base | rex_b << 3);
  if (no_base && rm != 4) operand.address = reinterpret_cast<int64_t>(next);  // the next instruction's
  operand.address += displacement;
  return operand;
}

// Whether the instruction at `code` is one of the tile unit's; then it is done.
bool compute(ucontext_t* context) {
  greg_t& rip = context->uc_mcontext.gregs[REG_RIP];
  const unsigned char* code = reinterpret_cast<const unsigned char*>(rip);
  if (code[0] != 0xc4 || (code[1] & 0x1f) != 2 || (code[2] & 0x84) != 0) return false;
  const int rex_x = !(code[1] & 0x40), rex_b = !(code[1] & 0x20), vvvv = (~code[2] >> 3) & 15, prefix = code[2] & 3;
  const unsigned char* const modrm = code + 4;
  const int reg = (*modrm >> 3) & 7, rm = *modrm & 7;
  const bool registers = *modrm >> 6 == 3;
  if (code[3] == 0x5c && prefix == 2 && registers) {
    if (!unit.configured) give_up("tdpbf16ps before ldtilecfg");
    multiply(reg, rm, vvvv);
    rip += 5;
    return true;
  }
  if (code[3] == 0x49 && prefix == 0 && registers && *modrm == 0xc0) {
    unit.configured = false;
    rip += 5;
    return true;
  }
  if (code[3] == 0x49 && prefix == 3 && registers) {
    if (!unit.configured) give_up("tilezero before ldtilecfg");
    std::memset(&unit.tiles[reg], 0, sizeof(Tile));
    rip += 5;
    return true;
  }
  const Operand operand = memory_operand(context, modrm, rex_x, rex_b);
  if (code[3] == 0x49 && prefix == 0 && !registers) {
    configure(reinterpret_cast<const unsigned char*>(operand.address + operand.stride));
    rip += 4 + operand.length;
    return true;
  }
  if (code[3] != 0x4b || registers || rm != 4 || (prefix != 3 && prefix != 2)) return false;
  if (!unit.configured) give_up("a tile is loaded or stored before ldtilecfg");
  for (int r = 0; r < unit.rows[reg]; r++) {
    unsigned char* memory = reinterpret_cast<unsigned char*>(operand.address + r * operand.stride);
    unsigned char* row = unit.tiles[reg].rows[r];
    if (prefix == 3) {
      std::memset(row, 0, 64);
      std::memcpy(row, memory, unit.bytes_of_row[reg]);
    } else {
      std::memcpy(memory, row, unit.bytes_of_row[reg]);
    }
  }
  rip += 4 + operand.length;
  return true;
}

void on_illegal(int, siginfo_t*, void* context) {
  if (!compute(static_cast<ucontext_t*>(context))) {
    signal(SIGILL, SIG_DFL);  // not ours: it is raised again
  }
}

// CPUID, which faults while a thread pretends.
void on_fault(int, siginfo_t*, void* context) {
  greg_t* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  const unsigned char* code = reinterpret_cast<const unsigned char*>(registers[REG_RIP]);
  if (code[0] != 0x0f || code[1] != 0xa2) {
    signal(SIGSEGV, SIG_DFL);
    return;
  }
  const uint32_t leaf = static_cast<uint32_t>(registers[REG_RAX]), part = static_cast<uint32_t>(registers[REG_RCX]);
  uint32_t a = leaf, b = 0, c = part, d = 0;
  cpuid_faults(false);
  asm volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  cpuid_faults(true);
  if (leaf == 7 && part == 0) d |= 1u << 22 | 1u << 24;  // AMX-BF16, AMX-TILE
  registers[REG_RAX] = a;
  registers[REG_RBX] = b;
  registers[REG_RCX] = c;
  registers[REG_RDX] = d;
  registers[REG_RIP] += 2;
}

void handle(int number, void (*handler)(int, siginfo_t*, void*)) {
  struct sigaction action = {};
  action.sa_sigaction = handler;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(number, &action, nullptr);
}

}  // namespace

extern "C" {

// Whether this thread's CPUID can be, and now is, as `does` says.
bool pretend(bool does) {
  handle(SIGILL, on_illegal);
  handle(SIGSEGV, on_fault);
  return cpuid_faults(does);
}

// How many products the unit has computed.
long products() { return multiplied; }

// libc's own in all but one thing: the kernel would not permit what the processor lacks.
long syscall(long number, ...) noexcept {
  va_list arguments;
  va_start(arguments, number);
  long given[6];
  for (long& argument : given) argument = va_arg(arguments, long);
  va_end(arguments);
  long result = -EPERM;
  if (number != SYS_arch_prctl || given[0] != ARCH_REQ_XCOMP_PERM) {
    result = raw_syscall(number, given[0], given[1], given[2], given[3], given[4], given[5]);
  } else if (given[1] == XFEATURE_XTILEDATA && !trouble("refused")) {
    result = 0;
  }
  if (result < 0 && result > -4096) {
    errno = static_cast<int>(-result);
    return -1;
  }
  return result;
}
}
