// Hold one VM that never runs. The kernel patches a jump label in the scheduler whenever the number
// of VMs goes from 0 to 1 or back, and QEMU's emulation may go on running the half-patched code.
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <unistd.h>

int main(void)
{
    int kvm = open("/dev/kvm", O_RDWR);
    if (ioctl(kvm, KVM_CREATE_VM, 0) < 0) {
        perror("hold-vm: /dev/kvm");
        return 1;
    }
    for (;;)
        pause();
}
