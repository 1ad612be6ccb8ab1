/* A UEFI application: it says "SRN-GUEST from uefi" on the first serial port and then does
 * nothing, not even when its power button is pressed. Position-independent, so no relocations.
 */
.code64
start:
    leaq text(%rip), %rsi
next:
    lodsb
    testb %al, %al
    jz rest
    movw $0x3f8, %dx
    outb %al, %dx
    jmp next
rest:
    sti
    hlt
    jmp rest
text: .asciz "\r\nSRN-GUEST from uefi\r\n"
