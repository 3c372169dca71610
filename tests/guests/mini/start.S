// Entry, and sleeping until an interrupt. KVM's instruction emulator has no long-mode iret, so an
// interrupt handler never returns: it jumps back to where `idle` halted, with that stack.

        .code64
        .section .text.start, "ax"
        .globl  _start
_start:                                 // 64-bit Linux boot protocol: %rsi is the zero page
        cli
        lea     stack_top(%rip), %rsp
        mov     %rsi, %rdi
        call    mini_main
halt:   cli
        hlt
        jmp     halt

        .text
        .globl  idle                    // void idle(void): sleep until the next interrupt
idle:   push    %rbx
        push    %rbp
        push    %r12
        push    %r13
        push    %r14
        push    %r15
        mov     %rsp, idle_stack(%rip)
        sti                             // takes effect after hlt: no interrupt is lost in between
        hlt
        cli
back:   mov     idle_stack(%rip), %rsp
        pop     %r15
        pop     %r14
        pop     %r13
        pop     %r12
        pop     %rbp
        pop     %rbx
        ret

        .globl  on_tick, on_keyboard, on_device
on_tick:
        incq    ticks(%rip)
        jmp     back
on_keyboard:
        movl    $1, keyboard_waits(%rip)
        jmp     back
on_device:
        incq    device_interrupts(%rip)
        jmp     back

        .bss
        .balign 16
idle_stack:
        .quad   0
        .balign 16
        .skip   16384
stack_top:

        .section .note.GNU-stack, "", @progbits
