/* Pieces of an answer that is told as it comes. libevent's way costs two epoll_ctl and a turn of the loop for
 * each of them: while nothing waits in its buffer a piece goes straight to the socket, and only what that
 * does not take, an error with it, goes libevent's way. */
#include <stdio.h>
#include <sys/socket.h>

#include "gateway/http_private.h"

enum { N_PIECES = 3 };

/* How many bytes the socket took. */
static size_t send_now(int fd, struct iovec *pieces)
{
    struct msghdr message = {.msg_iov = pieces, .msg_iovlen = N_PIECES};
    ssize_t n = sendmsg(fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    return n > 0 ? (size_t)n : 0;
}

void gw_wire_open(const gw_http *http, struct evhttp_request *req, gw_wire *wire_out)
{
    struct bufferevent *bev = evhttp_connection_get_bufferevent(evhttp_request_get_connection(req));
    *wire_out = (gw_wire){.output = bufferevent_get_output(bev),
                          .fd = http->gateway->serve_tls == NULL ? (int)bufferevent_getfd(bev) : -1,
                          .chunked = req->chunked};
}

size_t gw_wire_waiting(const gw_wire *wire)
{
    return evbuffer_get_length(wire->output);
}

void gw_wire_write(const gw_wire *wire, const cm_bytes *data)
{
    char size[24] = "", end[] = "\r\n";
    int n_size = wire->chunked ? snprintf(size, sizeof(size), "%zx\r\n", data->len) : 0;
    struct iovec pieces[N_PIECES] = {
        {size, (size_t)n_size}, {data->data, data->len}, {end, wire->chunked ? 2 : 0}};
    bool straight = wire->fd >= 0 && gw_wire_waiting(wire) == 0;
    size_t sent = straight ? send_now(wire->fd, pieces) : 0;
    for (size_t i = 0; i < N_PIECES; i++) {
        size_t skip = sent < pieces[i].iov_len ? sent : pieces[i].iov_len;
        if (skip < pieces[i].iov_len) {
            evbuffer_add(wire->output, (const char *)pieces[i].iov_base + skip, pieces[i].iov_len - skip);
        }
        sent -= skip;
    }
}
