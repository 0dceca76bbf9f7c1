/* A guest that measures a disk: it drives virtio-block itself and polls, at native speed also where a KVM interprets
 * kernels, because it runs in long mode at CPL 3. Its TSS allows it every port: IOPL is lost by some KVMs. Entered by PVH.
 *
 * It reads lines from COM1 and answers each with one: `OPERATION SIZE DEPTH COUNT` -> `TICKS KICKS`, ticks of the TSC and
 * notifications sent for COUNT requests of SIZE bytes, DEPTH of them in flight. Operations: r, w at random, s, t in order
 * (read, write). Each BLOCK of the disk is expected to begin with its offset, and is written so.
 */
#include <stdint.h>

#define COM1 0x3F8
#define QUEUE 256
#define BLOCK 4096
#define MIB (1ull << 20)
#define DATA (16 * MIB) /* buffers from here on */
#define DATA_END (192 * MIB)

enum { CAP_VENDOR = 9, CFG_COMMON = 1, CFG_NOTIFY = 2, CFG_DEVICE = 4 }; /* virtio 1.2 §4.1.4 */
enum { F_FLUSH = 1 << 9, F_INDIRECT = 1 << 28, F_EVENT_IDX = 1 << 29 };

struct common { /* §4.1.4.3 */
  uint32_t device_feature_select, device_feature, driver_feature_select, driver_feature;
  uint16_t msix, queues;
  uint8_t status, generation;
  uint16_t select, size, vector, enable, notify_off;
  uint32_t desc[2], driver[2], device[2];
};
struct descriptor { uint64_t address; uint32_t length; uint16_t flags, next; };
struct used { uint32_t id, length; };
struct request { /* its indirect table first, 16-byte aligned */
  struct descriptor table[3];
  uint32_t type, reserved;
  uint64_t sector;
  uint64_t offset;
  volatile uint8_t status;
} __attribute__((aligned(128)));

static struct descriptor ring[QUEUE] __attribute__((aligned(4096)));
static struct { uint16_t flags, index, entries[QUEUE], used_event; } avail __attribute__((aligned(4096)));
static struct { uint16_t flags, index; struct used entries[QUEUE]; uint16_t avail_event; } used
    __attribute__((aligned(4096)));
static struct request requests[QUEUE];
static volatile uint16_t *bell;
static uint64_t capacity, kicks;
static uint16_t seen;

/* 32-bit entry: long mode with the first 4 GiB mapped one to one for everybody, then CPL 3. */
__asm__(
    ".pushsection .note.Xen, \"a\", @note\n"
    ".long 4, 4, 18, 0x006e6558, enter\n" /* XEN_ELFNOTE_PHYS32_ENTRY */
    ".popsection\n"
    ".pushsection .bss\n.balign 4096\npml4: .skip 4096\npdpt: .skip 4096\ndirectories: .skip 4*4096\n"
    "tss: .skip 0x68+0x2001\n.balign 16\nstack: .skip 65536\nstack_end:\n.popsection\n"
    ".pushsection .data\n.balign 16\n"
    "gdt: .quad 0, 0x00af9a000000ffff, 0x00cff2000000ffff, 0x00affa000000ffff\n" /* code; user data, user code */
    "tss_descriptor: .quad 0x0000890000002068, 0\n"
    "gdtr: .word .-gdt-1\n.long gdt, 0\n.popsection\n"
    ".code32\n"
    "enter: cld\n"
    "movl $pdpt+7, pml4\n"
    "movl $directories+7, %eax\nmovl $pdpt, %edi\nmovl $4, %ecx\n"
    "1: movl %eax, (%edi)\naddl $4096, %eax\naddl $8, %edi\nloop 1b\n"
    "movl $0x87, %eax\nmovl $directories, %edi\nmovl $2048, %ecx\n"
    "2: movl %eax, (%edi)\naddl $0x200000, %eax\naddl $8, %edi\nloop 2b\n"
    "movl $pml4, %eax\nmovl %eax, %cr3\n"
    "movl %cr4, %eax\norl $0x20, %eax\nmovl %eax, %cr4\n"
    "movl $0xc0000080, %ecx\nrdmsr\norl $0x100, %eax\nwrmsr\n"
    "movl %cr0, %eax\norl $0x80000001, %eax\nmovl %eax, %cr0\n"
    "lgdt gdtr\nljmp $8, $3f\n"
    ".code64\n"
    "3: movl $stack_end, %esp\n"
    "movl $tss, %eax\nmovw %ax, tss_descriptor+2\nshrl $16, %eax\nmovb %al, tss_descriptor+4\n"
    "movw $0x68, tss+0x66\nmovb $0xff, tss+0x68+0x2000\nmovl $0x20, %eax\nltr %ax\n" /* every port allowed */
    "pushq $0x13\npushq $stack_end\npushq $0x2\npushq $0x1b\npushq $4f\niretq\n"
    "4: xorl %ebp, %ebp\ncall run\n");

static inline void out8(uint16_t port, uint8_t value) { __asm__ volatile("outb %0, %1" ::"a"(value), "d"(port)); }
static inline void out32(uint16_t port, uint32_t value) { __asm__ volatile("outl %0, %1" ::"a"(value), "d"(port)); }
static inline uint8_t in8(uint16_t port) {
  uint8_t value;
  __asm__ volatile("inb %1, %0" : "=a"(value) : "d"(port));
  return value;
}
static inline uint32_t in32(uint16_t port) {
  uint32_t value;
  __asm__ volatile("inl %1, %0" : "=a"(value) : "d"(port));
  return value;
}
static inline uint64_t ticks(void) {
  uint32_t low, high;
  __asm__ volatile("rdtsc" : "=a"(low), "=d"(high)::"memory");
  return (uint64_t)high << 32 | low;
}

static void put(char c) {
  while (!(in8(COM1 + 5) & 0x20)) {}
  out8(COM1, (uint8_t)c);
}
static void say(const char *text) {
  while (*text) put(*text++);
}
static void number(uint64_t value) {
  char text[21], *at = text + 20;
  for (*at = 0; value || at == text + 20; value /= 10) *--at = (char)('0' + value % 10);
  say(at);
}
static __attribute__((noreturn)) void fail(const char *text) {
  say("error: ");
  say(text);
  say("\n");
  for (;;) __asm__ volatile("pause");
}
static char get(void) {
  while (!(in8(COM1 + 5) & 1)) __asm__ volatile("pause");
  return (char)in8(COM1);
}
static uint64_t get_number(void) {
  uint64_t value = 0;
  for (char c; (c = get()) >= '0' && c <= '9';) value = value * 10 + (uint64_t)(c - '0');
  return value;
}

static uint32_t config(uint32_t device, uint32_t offset) {
  out32(0xCF8, 0x80000000u | device << 11 | offset);
  return in32(0xCFC);
}
static uint8_t config8(uint32_t device, uint32_t offset) { return (uint8_t)(config(device, offset & ~3u) >> (offset & 3) * 8); }

static uint8_t *structure(uint32_t device, uint32_t at) {
  uint32_t bar = 0x10 + 4 * config8(device, at + 4), low = config(device, bar);
  if ((low & 6) == 4 && config(device, bar + 4)) fail("a BAR above 4 GiB");
  return (uint8_t *)(uintptr_t)((low & ~15u) + config(device, at + 8));
}

static void start(void) {
  uint32_t device = 0, id = 0, at, notify_multiplier = 0;
  volatile struct common *common = 0;
  volatile uint32_t *disk = 0;
  uint8_t *notify = 0;
  for (; device < 32; device++) {
    id = config(device, 0);
    if (id == 0x10421AF4 || id == 0x10011AF4) break;
  }
  if (device == 32) fail("no virtio-block device");
  out32(0xCF8, 0x80000000u | device << 11 | 4);
  out32(0xCFC, in32(0xCFC) | 6); /* memory, bus master */
  for (at = config8(device, 0x34); at; at = config8(device, at + 1)) {
    if (config8(device, at) != CAP_VENDOR) continue;
    uint8_t kind = config8(device, at + 3);
    if (kind == CFG_COMMON) common = (volatile struct common *)structure(device, at);
    if (kind == CFG_DEVICE) disk = (volatile uint32_t *)structure(device, at);
    if (kind == CFG_NOTIFY) notify = structure(device, at), notify_multiplier = config(device, at + 16);
  }
  if (!common || !disk || !notify) fail("no virtio 1.0 structures");
  common->status = 0;
  while (common->status) {}
  common->status = 1;
  common->status = 3;
  common->device_feature_select = 0;
  uint32_t wanted = F_FLUSH | F_INDIRECT | F_EVENT_IDX;
  if ((common->device_feature & wanted) != wanted) fail("features");
  common->driver_feature_select = 0;
  common->driver_feature = wanted;
  common->driver_feature_select = 1;
  common->driver_feature = 1; /* VERSION_1 */
  common->status = 11;
  if (!(common->status & 8)) fail("features refused");
  common->select = 0;
  if (common->size < QUEUE) fail("a small queue");
  common->size = QUEUE;
  common->desc[0] = (uint32_t)(uintptr_t)ring, common->desc[1] = 0;
  common->driver[0] = (uint32_t)(uintptr_t)&avail, common->driver[1] = 0;
  common->device[0] = (uint32_t)(uintptr_t)&used, common->device[1] = 0;
  bell = (volatile uint16_t *)(notify + notify_multiplier * common->notify_off);
  common->enable = 1;
  common->status = 15;
  capacity = (disk[0] | (uint64_t)disk[1] << 32) * 512;
}

static uint64_t dice = 88172645463325252ull;
static uint64_t roll(void) { /* xorshift64 */
  dice ^= dice << 13;
  dice ^= dice >> 7;
  return dice ^= dice << 17;
}

static void offer(uint16_t n, uint64_t offset, int is_write, uint32_t size) {
  struct request *r = &requests[n];
  uint64_t data = DATA + (uint64_t)n * size;
  r->type = (uint32_t)is_write;
  r->sector = offset / 512;
  r->offset = offset;
  r->status = 0xFF;
  for (uint64_t at = 0; at < (is_write ? size : 1); at += BLOCK) *(volatile uint64_t *)(data + at) = is_write ? offset + at : ~0ull;
  r->table[0] = (struct descriptor){(uint64_t)(uintptr_t)&r->type, 16, 1, 1};
  r->table[1] = (struct descriptor){data, size, is_write ? 1 : 3, 2};
  r->table[2] = (struct descriptor){(uint64_t)(uintptr_t)&r->status, 1, 2, 0};
  ring[n] = (struct descriptor){(uint64_t)(uintptr_t)r->table, sizeof r->table, 4, 0};
  avail.entries[avail.index % QUEUE] = n;
  __atomic_store_n(&avail.index, (uint16_t)(avail.index + 1), __ATOMIC_RELEASE);
}

static void kick(uint16_t before) {
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
  uint16_t event = __atomic_load_n(&used.avail_event, __ATOMIC_RELAXED);
  if ((uint16_t)(avail.index - event - 1) < (uint16_t)(avail.index - before)) kicks++, *bell = 0;
}

static void measure(char kind, uint32_t size, uint32_t depth, uint64_t count) {
  uint64_t blocks = capacity / size, next = 0, begun = 0, done = 0, begin;
  int is_write = kind == 'w' || kind == 't', is_random = kind == 'r' || kind == 'w';
  if (!blocks || !depth || depth > QUEUE || depth > count || DATA + (uint64_t)size * depth > DATA_END) fail("impossible");
  kicks = 0;
  begin = ticks();
  while (done < count) {
    uint16_t before = avail.index;
    while (seen != __atomic_load_n(&used.index, __ATOMIC_ACQUIRE) || (begun < depth && begun < count)) {
      uint16_t n = (uint16_t)begun;
      if (begun >= depth) {
        n = (uint16_t)used.entries[seen % QUEUE].id;
        struct request *r = &requests[n];
        if (r->status) fail("a request failed");
        if (*(volatile uint64_t *)(DATA + (uint64_t)n * size) != r->offset) fail("wrong data");
        seen++;
        done++;
        avail.used_event = (uint16_t)(seen + 0x8000); /* no interrupts */
      }
      if (begun < count) offer(n, size * (is_random ? roll() % blocks : next++ % blocks), is_write, size), begun++;
    }
    if (avail.index != before) kick(before);
    __asm__ volatile("pause");
  }
  begin = ticks() - begin;
  number(begin);
  put(' ');
  number(kicks);
  put('\n');
}

__attribute__((noreturn, used)) void run(void) {
  avail.used_event = 0x8000;
  start();
  say("ready\n");
  for (;;) {
    char kind = get();
    if (kind < 'a') continue;
    get();
    uint32_t size = (uint32_t)get_number(), depth = (uint32_t)get_number();
    measure(kind, size, depth, get_number());
  }
}
