#include <arpa/inet.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netdb.h>
#include <netinet/in.h>
#include <stdio.h>
#include <string.h>

#include "common/net/net_private.h"

/* Splits at the last colon; brackets around a v6 host are dropped. false: no colon, or a bare v6 host. */
static bool address_split(const char *text, char host_out[NET_ADDRESS_BYTES], const char **port_out)
{
    const char *colon = strrchr(text, ':');
    if (colon == NULL) {
        return false;
    }
    size_t n = (size_t)(colon - text);
    bool bracketed = n >= 2 && text[0] == '[' && text[n - 1] == ']';
    if (bracketed) {
        text++;
        n -= 2;
    }
    if (n == 0 || n >= NET_ADDRESS_BYTES || (!bracketed && memchr(text, ':', n) != NULL)) {
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

cm_status net_address_parse(const char *text, bool names, struct sockaddr_storage *address_out, uint32_t *n_bytes_out,
                            cm_error *err)
{
    char host[NET_ADDRESS_BYTES];
    const char *port;
    if (!address_split(text, host, &port) || !address_port_ok(port)) {
        return cm_error_set(err, CM_E_INVALID, "address", "'%s' is not host:port or [v6 host]:port", text);
    }
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM,
                             .ai_flags = AI_NUMERICSERV | AI_PASSIVE | (names ? 0 : AI_NUMERICHOST)};
    struct addrinfo *found = NULL;
    int rc = getaddrinfo(host, port, &hints, &found);
    if (rc != 0) {
        return cm_error_set(err, CM_E_INVALID, "address", "host of '%s' cannot be %s: %s", text,
                            names ? "found" : "read as a numeric address", gai_strerror(rc));
    }
    memset(address_out, 0, sizeof(*address_out));
    memcpy(address_out, found->ai_addr, found->ai_addrlen);
    *n_bytes_out = (uint32_t)found->ai_addrlen;
    freeaddrinfo(found);
    return CM_OK;
}

void net_address_format(const struct sockaddr_storage *address, char text_out[NET_ADDRESS_BYTES])
{
    char host[INET6_ADDRSTRLEN] = "";
    if (address->ss_family == AF_INET6) {
        const struct sockaddr_in6 *in6 = (const struct sockaddr_in6 *)address;
        inet_ntop(AF_INET6, &in6->sin6_addr, host, sizeof(host));
        snprintf(text_out, NET_ADDRESS_BYTES, "[%s]:%u", host, ntohs(in6->sin6_port));
    } else {
        const struct sockaddr_in *in = (const struct sockaddr_in *)address;
        inet_ntop(AF_INET, &in->sin_addr, host, sizeof(host));
        snprintf(text_out, NET_ADDRESS_BYTES, "%s:%u", host, ntohs(in->sin_port));
    }
}

static bool address_is_wildcard(const struct sockaddr_storage *address)
{
    return address->ss_family == AF_INET6
               ? IN6_IS_ADDR_UNSPECIFIED(&((const struct sockaddr_in6 *)address)->sin6_addr)
               : ((const struct sockaddr_in *)address)->sin_addr.s_addr == htonl(INADDR_ANY);
}

static void address_set_host(struct sockaddr_storage *address, const struct sockaddr *host)
{
    if (address->ss_family == AF_INET6) {
        ((struct sockaddr_in6 *)address)->sin6_addr = ((const struct sockaddr_in6 *)host)->sin6_addr;
    } else {
        ((struct sockaddr_in *)address)->sin_addr = ((const struct sockaddr_in *)host)->sin_addr;
    }
}

/* A v6 link-local address needs a scope that the text form does not carry. */
static bool address_is_usable(const struct ifaddrs *it, sa_family_t family)
{
    if (it->ifa_addr == NULL || it->ifa_addr->sa_family != family || (it->ifa_flags & IFF_UP) == 0 ||
        (it->ifa_flags & IFF_LOOPBACK) != 0) {
        return false;
    }
    return family != AF_INET6 || !IN6_IS_ADDR_LINKLOCAL(&((const struct sockaddr_in6 *)it->ifa_addr)->sin6_addr);
}

void net_address_reachable(struct sockaddr_storage *address)
{
    if (!address_is_wildcard(address)) {
        return;
    }
    struct sockaddr_in loopback4 = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    struct sockaddr_in6 loopback6 = {.sin6_family = AF_INET6, .sin6_addr = IN6ADDR_LOOPBACK_INIT};
    address_set_host(address, address->ss_family == AF_INET6 ? (const struct sockaddr *)&loopback6
                                                             : (const struct sockaddr *)&loopback4);
    struct ifaddrs *all = NULL;
    if (getifaddrs(&all) != 0) {
        return;
    }
    for (const struct ifaddrs *it = all; it != NULL; it = it->ifa_next) {
        if (address_is_usable(it, address->ss_family)) {
            address_set_host(address, it->ifa_addr);
            break;
        }
    }
    freeifaddrs(all);
}
