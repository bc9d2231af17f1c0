/* Who asks: the key file in force, and the tenants it names in the machine that shares the routers among them
 * (tenant_core.h). The file is looked at twice a second; a new one takes force as a whole, one that cannot be
 * read leaves the last good one in force and is complained about once. Tenants and keys that are no longer in
 * it are refused from then on, what they have running ends in its own time. Without a file everybody is one
 * tenant, "default". Thread: the loop's. */
#pragma once
#include "common/proc/loop.h"
#include "gateway/stream.h"
#include "gateway/tenant_core.h"

typedef struct gw_tenants gw_tenants;

/* path "": no file. CM_E_CONFIG: err says what is wrong where. turns gets the tenants. */
CM_MUST_CHECK cm_status gw_tenants_create(pc_loop *loop, const char *path, gw_turns *turns,
                                          gw_tenants **tenants_out, cm_error *err);
void gw_tenants_destroy(gw_tenants *tenants); /* NULL is fine */

/* authorization: "Bearer KEY"; key: the bare one, looked at first. Either may be NULL. CM_E_INVALID:
 * nobody's, error_out is GW_CAUSE_UNAUTHENTICATED. */
CM_MUST_CHECK cm_status gw_tenants_identify(const gw_tenants *tenants, const char *authorization,
                                            const char *key, gw_tenant **tenant_out, gw_error *error_out);
bool gw_tenants_has_file(const gw_tenants *tenants);
/* May see and end what belongs to all. */
bool gw_tenants_is_operator(const gw_tenants *tenants, const gw_tenant *tenant);
