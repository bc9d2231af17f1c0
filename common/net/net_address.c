#include <arpa/inet.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netdb.h>
#include <netinet/in.h>
#include <stdio.h>
#include <string.h>

#include "common/net/net_private.h"

/* Splits at the last colon. false: no colon, or a host that is empty or too long. */
static bool address_split(const char *text, char host_out[NET_ADDRESS_BYTES], const char **port_out)
{
    const char *colon = strrchr(text, ':');
    size_t n = colon != NULL ? (size_t)(colon - text) : 0;
    if (n == 0 || n >= NET_ADDRESS_BYTES) {
        return false;
    }
    memcpy(host_out, text, n);
    host_out[n] = 0;
    *port_out = colon + 1;
    return true;
}

static bool address_port_ok(const char *port)
{
    size_t n = strspn(port, "0123456789");
    unsigned value = 0;
    return n > 0 && n <= 5 && port[n] == 0 && sscanf(port, "%u", &value) == 1 && value <= 65535;
}

cm_status net_address_parse(const char *text, bool names, struct sockaddr_in *address_out, cm_error *err)
{
    char host[NET_ADDRESS_BYTES];
    const char *port;
    if (!address_split(text, host, &port) || !address_port_ok(port)) {
        return cm_error_set(err, CM_E_INVALID, "address", "'%s' is not host:port", text);
    }
    if (strchr(host, ':') != NULL) {
        /* UCX 1.13 writes v6 addresses into room for v4 ones when it accepts such a link */
        return cm_error_set(err, CM_E_UNSUPPORTED, "address",
                            "'%s' is IPv6, which UCX 1.13 breaks on: use IPv4", text);
    }
    struct addrinfo hints = {.ai_family = AF_INET,
                             .ai_socktype = SOCK_STREAM,
                             .ai_flags = AI_NUMERICSERV | AI_PASSIVE | (names ? 0 : AI_NUMERICHOST)};
    struct addrinfo *found = NULL;
    int rc = getaddrinfo(host, port, &hints, &found);
    if (rc != 0) {
        return cm_error_set(err, CM_E_INVALID, "address", "host of '%s' cannot be %s: %s", text,
                            names ? "found" : "read as a numeric IPv4 address", gai_strerror(rc));
    }
    memcpy(address_out, found->ai_addr, sizeof(*address_out));
    freeaddrinfo(found);
    return CM_OK;
}

void net_address_format(const struct sockaddr_in *address, char text_out[NET_ADDRESS_BYTES])
{
    char host[INET_ADDRSTRLEN] = "";
    inet_ntop(AF_INET, &address->sin_addr, host, sizeof(host));
    snprintf(text_out, NET_ADDRESS_BYTES, "%s:%u", host, ntohs(address->sin_port));
}

void net_address_reachable(struct sockaddr_in *address)
{
    if (address->sin_addr.s_addr != htonl(INADDR_ANY)) {
        return;
    }
    address->sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    struct ifaddrs *all = NULL;
    if (getifaddrs(&all) != 0) {
        return;
    }
    for (const struct ifaddrs *it = all; it != NULL; it = it->ifa_next) {
        if (it->ifa_addr != NULL && it->ifa_addr->sa_family == AF_INET && (it->ifa_flags & IFF_UP) != 0 &&
            (it->ifa_flags & IFF_LOOPBACK) == 0) {
            address->sin_addr = ((const struct sockaddr_in *)it->ifa_addr)->sin_addr;
            break;
        }
    }
    freeifaddrs(all);
}
