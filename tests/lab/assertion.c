/* Lets QEMU's emulator go on where it asserts that it holds its lock, and does not.
 *
 * A guest that writes CR8 while KVM waits for a moment to inject an interrupt (V_IRQ) makes QEMU's TCG, release 10 as well
 * as 7, post that interrupt to the processor that runs, without the lock that its own assertion wants:
 * "tcg_handle_interrupt: assertion failed: (bql_locked())". UEFI firmware writes CR8 at the end of each interrupt, so none
 * of it runs in nested virtualization there. What the assertion guards is one word of the calling thread's own processor:
 * a bit that another thread sets there in the same few nanoseconds may be lost, which is the lesser evil.
 *
 * Loaded into QEMU by LD_PRELOAD, in GLib's place for failed assertions. All others end QEMU as ever, and so does this one
 * where the code behind it is not what its check jumps to if all is well.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Whether a jump over the call that returns to `after` leads there, past padding at most. */
static int is_jumped_over(const uint8_t *after)
{
    for (const uint8_t *at = after - 64; at < after - 5; at++)
        if (at[0] == 0x75 /* jne */ && at + 2 + (int8_t)at[1] >= after && at + 2 + (int8_t)at[1] < after + 16)
            return 1;
    return 0;
}

void g_assertion_message_expr(const char *domain, const char *file, int line, const char *function, const char *expression)
{
    (void)domain;
    if (strcmp(function, "tcg_handle_interrupt") == 0 && strstr(expression, "locked()")
        && is_jumped_over(__builtin_return_address(0)))
        return;
    fprintf(stderr, "%s:%d: %s: assertion failed: %s\n", file, line, function, expression);
    abort();
}
