/* Answers at once and stores nothing. */
#include <stdlib.h>

#include "slots.h"

struct null_storage {
    struct storage base;
    struct slots slots;
};

static struct slots *null_slots(struct storage *s) { return &((struct null_storage *)s)->slots; }

static int null_open(struct storage *s, const struct engine_setup *setup) { return slots_open(null_slots(s), setup); }

static void null_start(struct storage *s, struct storage_request *r) { engine_finish(s->engine, r, full_result(r)); }

static int null_name(struct storage *s, struct storage_request *r) { return slots_name(null_slots(s), r); }

static void null_give_back(struct storage *s, const struct storage_request *r) { slots_give_back(null_slots(s), r); }

static void null_close(struct storage *s) {
    slots_close(null_slots(s));
    free(s);
}

static const struct storage_ops null_ops = {
    .open = null_open, .start = null_start, .name = null_name, .give_back = null_give_back, .close = null_close,
};

struct storage *storage_null_new(uint64_t slot_bytes) {
    struct null_storage *s = calloc(1, sizeof *s);
    if (!s)
        return NULL;
    s->base.ops = &null_ops;
    s->base.is_fair = true;
    s->slots.slot_bytes = slot_bytes;
    return &s->base;
}
