/* A guest in one boot sector, for a BIOS.
 *
 * It says "SRN-GUEST ready" on the first serial port. Then, at every timer tick (18 a second), it
 * looks for the power button, and shuts down with a word when it was pressed. If the last byte
 * before the boot signature is not zero, it also writes 16 sectors at each tick, each filled with
 * a rising 32-bit count and lying at 1 + (count * 9e3779b1h >> 20), so within the first 2 MiB,
 * and says "." on the serial port.
 *
 * ACPI: SeaBIOS puts the power management block of both chipsets at port 600h: status at +0 and
 * enable at +2 with the power button as bit 8, control at +4 where 2000h means off.
 */
.code16
.org 0
start:
    xorw %ax, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movw $0x7c00, %sp
    cld
    movb %dl, 0x7c00+drive          /* from the BIOS */
    movw $0x602, %dx
    movw $0x100, %ax
    outw %ax, %dx
    movw $0x7c00+ready, %si
    call puts
tick:
    sti
    hlt
    movw $0x600, %dx
    inw %dx, %ax
    testb $1, %ah
    jnz off
    cmpb $0, 0x7c00+writes
    je tick
    movw $16, %cx
more:
    pushw %cx
    incl 0x7c00+count
    movl 0x7c00+count, %eax
    movw $0x8000, %di
    movw $128, %cx
    rep stosl
    imull $0x9e3779b1, %eax, %eax
    shrl $20, %eax
    incl %eax
    movl %eax, 0x7c00+packet+8
    movw $0x7c00+packet, %si
    movb $0x43, %ah                 /* int 13h extensions: write */
    movb $0, %al
    movb 0x7c00+drive, %dl
    int $0x13
    jc failed
    popw %cx
    loop more
    movw $0x7c00+dot, %si
    call puts
    jmp tick
failed:
    movw $0x7c00+error, %si
    call puts
    cli
    hlt
off:
    movw $0x7c00+button, %si
    call puts
    movw $0x604, %dx
    movw $0x2000, %ax
    outw %ax, %dx
    cli
    hlt
puts:
    lodsb
    testb %al, %al
    jz return
    movw $0x3f8, %dx
    outb %al, %dx
    jmp puts
return:
    ret

ready:  .asciz "SRN-GUEST ready\r\n"
error:  .asciz "\r\nSRN-GUEST write error\r\n"
button: .asciz "\r\nSRN-GUEST power button\r\n"
dot:    .asciz "."
    .balign 4
packet: .byte 16, 0
        .word 1, 0x8000, 0          /* one sector from 0000:8000 */
        .long 0, 0                  /* to this sector */
count:  .long 0
drive:  .byte 0

.org 509
writes: .byte 0
        .byte 0x55, 0xaa
