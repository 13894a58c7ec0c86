#include "slots.h"

#include <errno.h>
#include <stdlib.h>

int slots_open(struct slots *slots, const struct engine_setup *setup) {
    slots->count = slots->slot_bytes ? (uint32_t)(setup->own_bytes / slots->slot_bytes) : 0;
    slots->count_free = slots->count;
    slots->free = calloc(slots->count + 1, sizeof *slots->free);
    for (uint32_t i = 0; slots->free && i < slots->count; i++)
        slots->free[i] = (slots->count - 1 - i) * slots->slot_bytes;
    return slots->free ? 0 : -ENOMEM;
}

int slots_name(struct slots *slots, struct storage_request *r) {
    if (r->d.length > slots->slot_bytes)
        return -EINVAL;
    if (!slots->count)
        return -EOPNOTSUPP;
    if (!slots->count_free)
        return 0;
    r->region = slots->free[--slots->count_free];
    return 1;
}

void slots_give_back(struct slots *slots, const struct storage_request *r) {
    slots->free[slots->count_free++] = r->region;
}

void slots_close(struct slots *slots) { free(slots->free); }
