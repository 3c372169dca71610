// What the parts of the Linux guest's only process offer each other.
#ifndef GUEST_H
#define GUEST_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

// boot.c: from nothing to a running system
void mount_kernel_file_systems(void);
void load_modules(void);
const char *boot_option(const char *key); // the value of `key=` on the kernel's command line, or NULL
void configure_network(void);
int read_text(const char *path, char *text, size_t size); // bytes read, or -1; always terminated
uint64_t nanoseconds(int clock);

// drives.c: drives are found by the label of their ext4 file system
enum { CONFIG, SECRETS, DATA, DRIVES };
void mount_drives(void);                                  // those that are not mounted yet
bool unmount_small_drives(char *detail, size_t size);     // false: `detail` says which and why
void count_boot(void);
uint64_t boots(void);
void list_drives(char *json, size_t size);                // [{"label":...,"size_bytes":...},...]
void list_mounts(char *json, size_t size);                // ["config",...]

// agent.c
struct client {
    int socket;
    size_t length;
    char frame[65536];
};
extern uint64_t counter;
bool agent_receive(struct client *from); // false: the connection is over

#endif
