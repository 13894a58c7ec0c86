/* Equal slots of the own segment, for storages that only need somewhere for a write to land. */
#ifndef UBLKPOOL_SLOTS_H
#define UBLKPOOL_SLOTS_H

#include "storage.h"

struct slots {
    uint64_t slot_bytes;
    uint64_t *free;
    uint32_t count, count_free;
};

/* 0 or -ENOMEM. */
int slots_open(struct slots *slots, const struct engine_setup *setup);
/* As storage_ops.name and give_back. */
int slots_name(struct slots *slots, struct storage_request *r);
void slots_give_back(struct slots *slots, const struct storage_request *r);
void slots_close(struct slots *slots);

#endif
