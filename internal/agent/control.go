// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/aurorasoc/edr-sensor/internal/config"
	"github.com/aurorasoc/edr-sensor/internal/logging"
	"github.com/aurorasoc/edr-sensor/sensor/event"
)

// right is what a request on the control socket needs.
type right uint8

const (
	rightStatus  right = iota // see how the sensor does, and which cases are open
	rightContent              // read events
	rightCases                // open and close cases
	rightChange               // change how the sensor works
)

func (r right) String() string {
	return [...]string{"see the status", "read events", "open and close cases", "change the sensor"}[r]
}

// mayGroup is what the members of control.group may do. Root, and the user that
// the sensor runs as, may do everything; nobody else may do anything.
func mayGroup(r right) bool {
	switch r {
	case rightStatus, rightContent, rightCases:
		return true
	}
	return false
}

// Bounds of what the control socket takes from a client.
const (
	controlBody   = 64 << 10         // bytes of a request
	controlConns  = 64               // at the same time, of all users but root
	controlUser   = 32               // of one of them: nobody keeps the others out
	controlWrite  = 30 * time.Second // for an answer, of http.listen too, or the next part of a live view
	refusalsEvery = 10 * time.Second
)

// control answers the command line over the unix socket. The file's mode keeps
// others away; the credentials of who connected decide.
type control struct {
	mux    *http.ServeMux
	self   uint32                                // the sensor's own user
	group  func() (gid uint32, ok bool)          // control.group; ok is false without one
	decide func(context.Context, event.SelfInfo) // makes a decision known
	refuse *logging.Limiter
}

func newControl(self uint32, group func() (uint32, bool), decide func(context.Context, event.SelfInfo)) *control {
	return &control{mux: http.NewServeMux(), self: self, group: group, decide: decide, refuse: logging.NewLimiter(refusalsEvery)}
}

// handle mounts h for peers that have the right.
func (c *control) handle(pattern string, r right, h http.HandlerFunc) {
	c.mux.HandleFunc(pattern, func(w http.ResponseWriter, req *http.Request) {
		if !c.allows(w, req, r) {
			return
		}
		req.Body = http.MaxBytesReader(w, req.Body, controlBody)
		h(w, req)
	})
}

// ServeHTTP answers nobody who may not even see the status, whatever is asked.
func (c *control) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if c.allows(w, r, rightStatus) {
		c.mux.ServeHTTP(w, r)
	}
}

func (c *control) may(p peer, r right) bool {
	if p.UID == 0 || p.UID == c.self {
		return true
	}
	gid, ok := c.group()
	return ok && p.member(gid) && mayGroup(r)
}

// allows answers the request itself when the peer has not the right.
func (c *control) allows(w http.ResponseWriter, req *http.Request, r right) bool {
	p, ok := peerFrom(req.Context())
	if ok && c.may(p, r) {
		return true
	}
	c.refused(req.Context(), p, fmt.Sprintf("may not %s", r))
	w.Header().Set("Connection", "close") // what follows is not read
	http.Error(w, fmt.Sprintf("user %d may not %s: use sudo, or join the group named by control.group where that is enough", p.UID, r), http.StatusForbidden)
	return false
}

// refused makes a refusal known, but no flood of them.
func (c *control) refused(ctx context.Context, p peer, why string) {
	ctx = context.WithoutCancel(ctx)
	c.refuse.Say(fmt.Sprintf("%d %s", p.UID, why), func(more uint64) {
		c.decide(ctx, event.SelfInfo{
			Stream: event.DecisionsApprovals, Name: "Control Refused", Severity: 3, Failed: true, Code: "CONTROL_REFUSED",
			Message: fmt.Sprintf("the control socket refused %s: it %s", p, why), Count: more + 1, Attrs: p.attrs(),
		})
	})
}

// answerBy ends an answer that the client does not take, so that none holds on to
// what is the sensor's. It starts anew with each call.
func answerBy(w http.ResponseWriter) {
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(controlWrite)) // a connection has deadlines
}

// readJSON reads a request's body strictly: one value, no unknown fields. It
// answers itself when there is something wrong.
func readJSON(w http.ResponseWriter, r *http.Request, into any) bool {
	d := json.NewDecoder(r.Body)
	d.DisallowUnknownFields()
	err := d.Decode(into)
	if err == nil {
		if _, more := d.Token(); !errors.Is(more, io.EOF) {
			err = errors.New("more than one value")
		}
	}
	var large *http.MaxBytesError
	switch {
	case err == nil:
		return true
	case errors.As(err, &large):
		http.Error(w, fmt.Sprintf("request of more than %d bytes", large.Limit), http.StatusRequestEntityTooLarge)
	default:
		http.Error(w, "request: "+err.Error(), http.StatusBadRequest)
	}
	return false
}

func writeJSON(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	_ = enc.Encode(v) // the client went away: nothing to do
}

// controlHandler is what the control socket serves. Each line says who may.
func (a *Agent) controlHandler(ctx context.Context) *control {
	c := newControl(uint32(os.Geteuid()), a.controlGroup(ctx), a.decide)
	c.handle("GET /status", rightStatus, func(w http.ResponseWriter, _ *http.Request) {
		s := a.status()
		// Who is investigated is told to nobody over HTTP.
		s.Cases, s.Warnings = a.cases.list(), newestWarnings(ctx)
		writeJSON(w, s)
	})
	c.handle("GET /metrics", rightStatus, a.serveMetrics().ServeHTTP)
	c.handle("GET /config", rightStatus, a.serveConfig)
	c.handle("GET /tap", rightContent, a.serveTap)
	c.handle("GET /cases", rightStatus, a.serveCases)
	c.handle("POST /cases/open", rightCases, a.untilStop(a.serveCaseOpen))
	c.handle("POST /cases/close", rightCases, a.untilStop(a.serveCaseClose))
	c.handle("GET /log", rightStatus, serveLog)
	c.handle("GET /log/recent", rightContent, serveRecent)
	c.handle("POST /log", rightChange, a.untilStop(changeLog(a.decide)))
	c.handle("GET /decisions", rightContent, a.serveDecisions)
	c.handle("POST /reload", rightChange, a.untilStop(a.serveReload))
	a.newDesk().mount(c)
	return c
}

// untilStop refuses what nobody would carry out any more.
func (a *Agent) untilStop(h http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if a.stopping.Load() {
			http.Error(w, errStopping.Error()+": ask again when it runs", http.StatusServiceUnavailable)
			return
		}
		h(w, r)
	}
}

// controlGroup looks the group up anew for each request: its number may change,
// and a group that is gone must not let in whoever gets its number next.
func (a *Agent) controlGroup(ctx context.Context) func() (uint32, bool) {
	name := a.cfg.Control.Group
	failed := logging.NewLimiter(time.Minute)
	return func() (uint32, bool) {
		if name == "" {
			return 0, false
		}
		gid, err := lookupGroup(name)
		if err != nil {
			failed.Log(ctx, zap.WarnLevel, "group", "control.group cannot be looked up: only root may use the control socket", zap.Error(err))
			return 0, false
		}
		return gid, true
	}
}

func lookupGroup(name string) (uint32, error) {
	g, err := user.LookupGroup(name)
	if unknown := user.UnknownGroupError(""); errors.As(err, &unknown) {
		return 0, &config.Problem{Key: "control.group", Value: name, What: "is no group of this host", Remedy: "make it, or leave it empty for root only"}
	}
	if err != nil {
		return 0, fmt.Errorf("control.group: %w", err)
	}
	gid, err := strconv.ParseUint(g.Gid, 10, 32)
	if err != nil {
		return 0, fmt.Errorf("control.group %s: gid %q: %w", name, g.Gid, err)
	}
	return uint32(gid), nil
}

// listenControl takes over the path of a sensor that is gone, never of one
// that still answers.
func listenControl(ctx context.Context, path, group string) (net.Listener, error) {
	var lc net.ListenConfig
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, err
	}
	d := net.Dialer{Timeout: time.Second}
	if c, err := d.DialContext(ctx, "unix", path); err == nil {
		return nil, errors.Join(fmt.Errorf("another sensor answers on %s: stop it, or set another path", path), c.Close())
	}
	if fi, err := os.Lstat(path); err == nil {
		if fi.Mode().Type() != os.ModeSocket {
			return nil, fmt.Errorf("%s is there and is no socket: remove it, or set another path", path)
		}
		if err := os.Remove(path); err != nil {
			return nil, err
		}
	}
	l, err := lc.Listen(ctx, "unix", path)
	if err != nil {
		return nil, err
	}
	if err := admit(path, group); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return &peerListener{Listener: l, open: map[uint32]int{}}, nil
}

// admit lets root, and the group if one is named, connect to the socket.
func admit(path, group string) error {
	if group == "" {
		return os.Chmod(path, 0o600)
	}
	gid, err := lookupGroup(group)
	if err != nil {
		return err
	}
	if err := os.Chown(path, -1, int(gid)); err != nil {
		return fmt.Errorf("control.group %s: %w", group, err)
	}
	return os.Chmod(path, 0o660)
}

// peerListener accepts connections of peers that it can identify, and no more
// of a user than are good for the others.
type peerListener struct {
	net.Listener
	mu   sync.Mutex
	open map[uint32]int // by uid; not root's
	sum  int
}

// passing is an error of accept(2), of the new connection or for want of memory: the
// server logs it, waits for up to a second and tries again. The socket itself stays.
type passing struct{ error }

func (passing) Timeout() bool   { return false }
func (passing) Temporary() bool { return true }
func (p passing) Unwrap() error { return p.error }

type peerConn struct {
	boundConn
	peer peer
}

func (l *peerListener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if errors.Is(err, net.ErrClosed) {
			return nil, err
		}
		if err != nil {
			return nil, passing{err}
		}
		u, ok := c.(*net.UnixConn)
		if !ok {
			return nil, errors.Join(fmt.Errorf("control socket: %T is no unix socket: %w", c, fs.ErrInvalid), c.Close())
		}
		p, err := peerOf(u)
		if err != nil || !l.enter(p.UID) {
			_ = c.Close() // nobody to tell
			continue
		}
		return &peerConn{boundConn{Conn: c, gone: func() { l.leave(p.UID) }}, p}, nil
	}
}

func (l *peerListener) enter(uid uint32) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if uid == 0 {
		return true
	}
	if l.sum >= controlConns || l.open[uid] >= controlUser {
		return false
	}
	l.open[uid]++
	l.sum++
	return true
}

func (l *peerListener) leave(uid uint32) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if uid == 0 {
		return
	}
	l.sum--
	if l.open[uid]--; l.open[uid] == 0 {
		delete(l.open, uid)
	}
}

// identify puts the peer of a connection into the context of its requests.
func identify(ctx context.Context, c net.Conn) context.Context {
	if pc, ok := c.(*peerConn); ok {
		return withPeer(ctx, pc.peer)
	}
	return ctx
}
