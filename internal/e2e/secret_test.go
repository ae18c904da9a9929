// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"io/fs"
	"maps"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/aurorasoc/edr-sensor/transport"
	"github.com/aurorasoc/edr-sensor/transport/redistest"
)

// holding are the places whose text has a secret in it, plain or in a form that gives it away.
func holding(places map[string]string, secrets ...string) (found []string) {
	for place, text := range places {
		for _, s := range secrets {
			for _, form := range []string{s, base64.StdEncoding.EncodeToString([]byte(s)), hex.EncodeToString([]byte(s)), url.QueryEscape(s)} {
				if strings.Contains(text, form) && !slices.Contains(found, place) {
					found = append(found, place)
				}
			}
		}
	}
	slices.Sort(found)
	return found
}

// TestSecretsStayInside: a sensor that logs in with a password, from a file or from systemd,
// whose password is changed, refused and repeated by the server, shows none of its passwords
// to anybody: in its log, its pages, what it sends, what it writes, its arguments and
// environment, and what it prints when it is ended by force.
func TestSecretsStayInside(t *testing.T) {
	requireHost(t)
	for _, source := range []string{"file", "credential", "control"} {
		t.Run(source, func(t *testing.T) { secretsStayInside(t, source) })
	}
}

func secretsStayInside(t *testing.T, source string) {
	const first, wrong = "f1rst/s3cret+%", "wr0ng/s3cret+%"
	w := startWorkload(t)
	acl, err := os.ReadFile("../../packaging/redis/edr-sensor.acl")
	if err != nil {
		t.Fatal(err)
	}
	users := filepath.Join(t.TempDir(), "users.acl")
	if err := os.WriteFile(users, bytes.Replace(acl, []byte("CHANGE-ME"), []byte(first), 1), 0o600); err != nil {
		t.Fatal(err)
	}
	// It does not know AUTH by that name, and repeats what it does not know.
	server := redistest.Start(t, redistest.Options{AOF: "everysec", Config: map[string]string{"aclfile": users, "rename-command": "AUTH LOGIN"}})
	c := server.Client()
	defer c.Close()

	h := newHost(t, w, server.Addr(), "")
	dir := filepath.Dir(h.config)
	credentials := t.TempDir()
	h.env = []string{"GOTRACEBACK=crash", "EDR_SENSOR_TRANSPORT__USERNAME=edr-sensor", "EDR_SENSOR_TRANSPORT__PASSWORD_FILE=redis-password", "CREDENTIALS_DIRECTORY=" + credentials}
	switch source {
	case "file": // of which systemd has made a copy that is old by now
		if err := os.WriteFile(filepath.Join(credentials, "redis-password"), []byte(wrong), 0o600); err != nil {
			t.Fatal(err)
		}
	case "credential":
		dir = credentials
	case "control":
		h.env = append(h.env, "PLANTED="+first)
	}
	password := filepath.Join(dir, "redis-password")
	write := func(p string) {
		t.Helper()
		if err := os.WriteFile(password, []byte(p+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	kick := func() {
		t.Helper()
		if err := c.Do(t.Context(), "CLIENT", "KILL", "USER", "edr-sensor").Err(); err != nil {
			t.Fatal(err)
		}
		w.do(order{Op: "exec", N: 3})
	}
	class := func(want transport.Class) {
		t.Helper()
		eventually(t, 60*time.Second, fmt.Sprintf("class %s", want), func() bool {
			s, err := h.status()
			return err == nil && s.Transport.ErrorClass == string(want)
		})
	}
	write(first)
	h.start()
	w.do(order{Op: "exec", N: 20})
	h.delivered(60 * time.Second)
	if source != "control" {
		write(wrong)
		kick()
		// To HELLO it says WRONGPASS; to the AUTH that go-redis tries then, that and the password.
		class(transport.ClassScripting)
		if err := os.Remove(password); err != nil {
			t.Fatal(err)
		}
		kick()
		class(transport.ClassCredentials)
		write(first)
		h.delivered(2 * time.Minute)
	}

	places := map[string]string{}
	for _, path := range []string{"/metrics", "/readyz", "/healthz"} {
		_, places[path] = h.get(path)
	}
	for _, path := range []string{"/status"} {
		r, err := h.control().Get("http://sensor" + path)
		if err != nil {
			t.Fatal(err)
		}
		var b bytes.Buffer
		_, err = b.ReadFrom(r.Body)
		if r.Body.Close(); err != nil {
			t.Fatal(err)
		}
		places[path] = b.String()
	}
	for _, file := range []string{"cmdline", "environ"} {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", h.proc.Process.Pid, file))
		if err != nil {
			t.Fatal(err)
		}
		places[file] = string(b)
	}
	for _, args := range []string{"status", "status -o json", "doctor", "check", "log", "buffer info"} {
		cmd := exec.Command(binary(t), append(strings.Fields(args), "--config", h.config)...)
		cmd.Env = slices.DeleteFunc(append(os.Environ(), h.env...), func(s string) bool { return strings.HasPrefix(s, "PLANTED=") })
		out, _ := cmd.CombinedOutput() // some say by their exit code that something is not well
		places[args] = string(out)
	}
	// The last words: every goroutine with its stack and registers.
	if err := h.proc.Process.Signal(syscall.SIGQUIT); err != nil {
		t.Fatal(err)
	}
	_ = h.proc.Wait()
	h.proc = nil
	places["log"] = string(bytes.Join(h.log.all(), []byte("\n")))
	h.log = &lines{} // of which the end is no log
	for place, want := range map[string]string{"log": "goroutine ", "/status": `"transport"`, "/metrics": "transport_errors_total", "environ": "PASSWORD_FILE=", "status": "edr-sensor"} {
		if !strings.Contains(places[place], want) {
			t.Errorf("%s has no %q: %.300s", place, want, places[place])
		}
	}
	if err := filepath.WalkDir(h.dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() || path == password {
			return err
		}
		b, err := os.ReadFile(path)
		places["file "+d.Name()] = string(b)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	var sent strings.Builder
	for _, r := range readStreams(t, c) {
		sent.Write(r.data)
	}
	places["streams"] = sent.String()
	var want []string
	if source == "control" {
		want = []string{"environ"}
	}
	if d := cmp.Diff(want, holding(places, first, wrong)); d != "" {
		t.Errorf("places with a password in them, of %v (-want +got):\n%s", slices.Sorted(maps.Keys(places)), d)
	}
}

// TestMisplacedSecret: a password where it does not belong is refused, with a word on where
// it does, and not printed.
func TestMisplacedSecret(t *testing.T) {
	const secret = "m1splaced-s3cret"
	dir := t.TempDir()
	for i, yaml := range []string{
		`transport: {address: "redis://edr-sensor:` + secret + `@127.0.0.1:6379"}`,
		`transport: {address: "edr-sensor:` + secret + `@127.0.0.1:6379"}`,
		`transport: {address: "127.0.0.1:6379,edr-sensor:` + secret + `@127.0.0.2:6379", topology: cluster}`,
		`transport: {address: "127.0.0.1:6379", password: ` + secret + `}`,
		`transport: {address: "127.0.0.1:6379", password: [` + secret + `]}`,
		`transport: {address: "127.0.0.1:6379", sentinel: {password: "` + secret + `"}}`,
		"",
	} {
		path := filepath.Join(dir, fmt.Sprintf("%d.yaml", i))
		if err := os.WriteFile(path, []byte("agent: {state_dir: "+dir+"/state}\n"+yaml+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		for _, command := range []string{"run", "check"} {
			cmd := exec.Command(binary(t), command, "--config", path)
			cmd.Env = os.Environ()
			if yaml == "" {
				cmd.Env = append(cmd.Env, "EDR_SENSOR_TRANSPORT__PASSWORD="+secret, "EDR_SENSOR_TRANSPORT__ADDRESS=u:"+secret+"@h:6379")
			}
			out, err := cmd.CombinedOutput()
			if code := cmd.ProcessState.ExitCode(); code != 78 {
				t.Errorf("%s with %s: exit code %d, %v", command, yaml, code, err)
			}
			if text := string(out); len(holding(map[string]string{"output": text}, secret)) > 0 || !strings.Contains(text, "password_file") {
				t.Errorf("%s with %s says: %s", command, yaml, text)
			}
		}
	}
}
