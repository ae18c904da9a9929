// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/aurorasoc/edr-sensor/internal/evidence"
)

// bounds are how much is shown of what there may be any amount of.
type bounds struct{ lines, problems, missing, cases, warnings int }

// screen lays the status out for a terminal of 80 columns and 24 lines, or for what
// there is. On a small one the kinds with the fewest events are left out first, then
// texts are cut.
func (s *sensorStatus) screen(now time.Time, zone *time.Location, st style) *screen {
	full := s.layout(now, zone, st, bounds{lines: 2, problems: 4, missing: 3, cases: 3, warnings: 3})
	if st.height > 0 && len(full.lines) >= st.height { // the prompt needs one
		return s.layout(now, zone, st, bounds{lines: 1, problems: 2, missing: 1, cases: 1, warnings: 1})
	}
	return full
}

// kindsLeast is how high the table of kinds is at least: its head, two, the rest, all.
const kindsLeast = 5

func (s *sensorStatus) layout(now time.Time, zone *time.Location, st style, most bounds) *screen {
	top, bottom := &screen{style: st}, &screen{style: st}
	s.head(top, now, most)
	s.coverage(top, most)
	s.stores(bottom, now, most)
	s.delivery(bottom, now, most)
	s.cases(bottom, now, most)
	s.troubles(bottom, zone, most)
	room := 0
	if st.height > 0 {
		room = max(st.height-1-len(top.lines)-len(bottom.lines), kindsLeast)
	}
	s.kinds(top, room)
	top.lines = append(top.lines, bottom.lines...)
	return top
}

func (s *sensorStatus) head(to *screen, now time.Time, most bounds) {
	colour := yellow
	switch s.Mode {
	case "online":
		if len(s.Problems) == 0 {
			colour = green
		}
	case "degraded", "truncating":
		colour = red
	}
	b := to.build()
	b.add(bold, "edr-sensor "+safe(s.Version))
	b.add(plain, "  "+safe(s.AgentID)+"  ")
	b.add(colour, safe(s.Mode))
	b.add(plain, " for "+ago(now, s.Since))
	to.end(b)
	problems := slices.DeleteFunc(slices.Clone(s.Problems), func(p problem) bool {
		return p.Metric == deliveryMetric && s.Transport.Error != "" // said below
	})
	if len(s.Problems) == 0 && s.Reason != "" {
		to.text("", plain, s.Reason, most.lines)
	}
	for i, p := range problems {
		if i == most.problems {
			to.row("", colour, "and %d more: edr-sensor status --json", len(problems)-i)
			break
		}
		text := p.Reason
		if p.Metric != "" {
			text += " (" + p.Metric + ")"
		}
		to.text("", colour, text, most.lines)
	}
	about := []string{s.Scope}
	for _, key := range sorted(s.Context) {
		about = append(about, key+" "+s.Context[key])
	}
	to.text("scope", plain, strings.Join(about, ", "), 1)
}

// deliveryMetric is that of the problem that Redis does not take events.
const deliveryMetric = "transport_connected"

// coverage says what is missing or degraded, and only how much is not.
func (s *sensorStatus) coverage(to *screen, most bounds) {
	seen := 0
	var missing []covered
	degraded := map[string][]string{} // events, by what they do not see
	for _, c := range s.Coverage {
		switch {
		case c.Hook == "":
			missing = append(missing, c)
			continue
		case strings.HasSuffix(c.Hook, syscallHook):
			degraded[c.Blind] = append(degraded[c.Blind], c.Event)
		}
		seen++
	}
	to.row("coverage", plain, "%d of %d kinds of events are seen", seen, len(s.Coverage))
	for _, blind := range sorted(degraded) {
		events := degraded[blind]
		text := "degraded: " + families(events) + " (system calls"
		if blind != "" {
			text += ", not " + blind
		}
		text += ")"
		to.text("", yellow, text, most.lines)
	}
	for i, c := range missing {
		if i == most.missing {
			to.row("", yellow, "and %d more are missing: edr-sensor doctor", len(missing)-i)
			break
		}
		text := "missing: " + c.Event
		if n := len(c.Errors); n > 0 {
			text += ": " + c.Errors[n-1]
		}
		to.text("", yellow, text, 1) // doctor tells more
	}
}

// families names events shortly: by their family where there are many of it.
func families(events []string) string {
	by := map[string][]string{}
	for _, e := range events {
		family, _, _ := strings.Cut(e, ".")
		by[family] = append(by[family], e)
	}
	var names []string
	for _, family := range sorted(by) {
		if n := len(by[family]); n > 2 {
			names = append(names, fmt.Sprintf("%d of %s.*", n, family))
		} else {
			names = append(names, by[family]...)
		}
	}
	return strings.Join(names, ", ")
}

// kinds is a table of the events in at most room lines; 0: as many as it needs.
func (s *sensorStatus) kinds(to *screen, room int) {
	all := s.counts()
	var sum count
	for _, n := range all {
		sum = sum.plus(n)
	}
	names := make([]string, 0, len(all))
	for kind, n := range all {
		if n != (count{}) {
			names = append(names, kind)
		}
	}
	if room > 0 && len(names)+2 > room {
		all, names = byFamily(all, names)
	}
	slices.SortFunc(names, func(a, b string) int {
		return cmp.Or(cmp.Compare(all[b].rate, all[a].rate), cmp.Compare(all[b].seen, all[a].seen), cmp.Compare(a, b))
	})
	b := to.build()
	b.add(dim, fmt.Sprintf("%-*s%-18s %9s %15s %11s %11s", labelWidth, "events", "", "a second", "seen", "lost", "left out"))
	to.end(b)
	line := func(name, colour string, n count) {
		b := to.build()
		b.add(plain, strings.Repeat(" ", labelWidth))
		b.add(colour, pad(name, 18))
		b.add(colour, fmt.Sprintf(" %9s %15s", s.perSecond(n.rate), thousands(n.seen)))
		lost := colour
		if n.lost > 0 {
			lost = red
		}
		b.add(lost, fmt.Sprintf(" %11s", thousands(n.lost)))
		b.add(colour, fmt.Sprintf(" %11s", thousands(n.suppressed)))
		to.end(b)
	}
	shown := names
	if room > 0 && len(names)+2 > room {
		shown = names[:max(room-3, 0)]
	}
	for _, name := range shown {
		line(name, plain, all[name])
	}
	if len(shown) < len(names) {
		var rest count
		for _, name := range names[len(shown):] {
			rest = rest.plus(all[name])
		}
		line(fmt.Sprintf("%d more kinds", len(names)-len(shown)), dim, rest)
	}
	if len(names) != 1 {
		line("all", bold, sum)
	}
}

// perSecond is a rate, or a dash in the first moments.
func (s *sensorStatus) perSecond(rate float64) string {
	if s.Rates == nil {
		return "-"
	}
	return rateText(rate)
}

func rateText(rate float64) string {
	if rate > 0 && rate < 99.95 {
		return fmt.Sprintf("%.1f", rate)
	}
	return thousands(uint64(rate + 0.5))
}

const gaugeWidth = 20

// stores are the places where events wait.
func (s *sensorStatus) stores(to *screen, now time.Time, most bounds) {
	var rings []string
	for _, name := range sorted(s.Sensor.Rings) {
		r := s.Sensor.Rings[name]
		rings = append(rings, fmt.Sprintf("%s %s of %s", safe(name), percent(int64(r.Used), int64(r.Size)), bytesText(int64(r.Size))))
	}
	if len(rings) > 0 {
		to.row("rings", plain, "%s", strings.Join(rings, ", "))
	}

	f := s.Buffer
	b := to.build()
	b.add(dim, fmt.Sprintf("%-*s", labelWidth, "buffer"))
	to.gauge(b, gaugeWidth, f.Bytes, f.Bytes-f.UnsentBytes, f.Cap)
	b.add(plain, fmt.Sprintf(" %s of %s", percent(f.Bytes, f.Cap), bytesText(f.Cap)))
	b.add(plain, ", "+s.outlook(now))
	to.end(b)
	to.row("", plain, "%s records (%s) to deliver, %s kept after delivery", thousands(f.Unsent), bytesText(f.UnsentBytes), thousands(f.Records-min(f.Records, f.Unsent)))
	if f.Truncated > 0 || f.Corrupt > 0 {
		to.row("", red, "%s records dropped undelivered, %s damaged", thousands(f.Truncated), thousands(f.Corrupt))
	}
	if f.Error != "" {
		to.text("", red, "cannot write: "+f.Error, most.lines)
	}
	for _, h := range f.Hazards {
		to.text("", yellow, h, most.lines)
	}
	if f.ResizeError != "" {
		to.text("", red, "cannot be resized: "+f.ResizeError, most.lines)
	}
	if f.Recovery != nil {
		to.text("", red, recoveryText(f.Recovery, now), most.lines)
	}
	if f.Quarantined > 0 {
		to.text("", yellow, fmt.Sprintf("%s are set aside: edr-sensor buffer info", bytesText(f.Quarantined)), most.lines)
	}
}

// recoveryText says how a damaged file was replaced.
func recoveryText(r *evidence.Recovery, now time.Time) string {
	text := fmt.Sprintf("%s ago a damaged file was replaced: %s salvaged, ", ago(now, r.At), thousands(r.Salvaged))
	if r.Exact {
		text += thousands(r.Lost) + " lost: "
	} else {
		text += "how many are lost is unknown: "
	}
	return text + r.Cause
}

// drainsAfter is how long records wait at least when they do not go as they come.
const drainsAfter = 10 * time.Second

// outlook says when the buffer will be full, or empty.
func (s *sensorStatus) outlook(now time.Time) string {
	f := s.Buffer
	const far = 30 * 24 * time.Hour
	switch r := s.Rates; {
	case s.Mode == "truncating":
		return "full: the oldest records go"
	case r == nil:
		return "rate not yet known"
	case f.FullIn != nil && *f.FullIn < far.Seconds():
		return "full in " + span(time.Duration(*f.FullIn*float64(time.Second)))
	case f.FullIn != nil:
		return "full in more than 30 days"
	case r.Fill < 0 && now.Sub(f.Oldest) > drainsAfter && !f.Oldest.IsZero():
		return "drained in " + span(time.Duration(min(float64(f.UnsentBytes)/-r.Fill, far.Seconds())*float64(time.Second)))
	}
	return "does not fill"
}

func (s *sensorStatus) delivery(to *screen, now time.Time, most bounds) {
	t := s.Transport
	n := s.Buffer.Last - min(s.Buffer.Last, t.Acked)
	behind := thousands(n) + " behind"
	if o := s.Buffer.Oldest; n > 0 && now.Sub(o) >= time.Second && !o.IsZero() {
		behind += ", the oldest waits for " + ago(now, o)
	}
	switch t.State {
	case "off", "":
		text := "off: no Redis is configured, events stay in the buffer"
		if o := s.Buffer.Oldest; !o.IsZero() {
			text += ", the oldest for " + ago(now, o)
		}
		to.text("delivery", plain, text, most.lines)
	case "connected":
		if s.Rates != nil {
			behind = rateText(s.Rates.Delivered) + " a second, " + behind
		}
		to.row("delivery", plain, "%s", behind)
		to.text("", plain, fmt.Sprintf("connected to %s for %s", t.Address, ago(now, t.Since)), 1)
	default:
		to.text("delivery", yellow, fmt.Sprintf("%s for %s: %s", t.State, ago(now, t.Since), t.Address), 1)
		to.row("", plain, "%s", behind)
	}
	if t.Error != "" {
		to.text("", yellow, t.ErrorClass+": "+t.Error, most.lines)
		to.text("", plain, t.Hint, most.lines)
	}
	if t.Refused > 0 {
		to.text("", red, plural64(t.Refused, "record")+" set aside that Redis does not take: edr-sensor buffer info", most.lines)
	}
	to.text("", red, t.Warning, most.lines)
}

func (s *sensorStatus) cases(to *screen, now time.Time, most bounds) {
	label := "cases"
	for i, c := range s.Cases {
		if i == most.cases {
			to.row("", plain, "and %d more: edr-sensor case list", len(s.Cases)-i)
			return
		}
		text := fmt.Sprintf("%s on %s %s for %s, %s events", c.ID, c.Scope.Kind, c.Scope.Value, left(now, c.Until), thousands(c.Tagged))
		if c.Collect == "deep" {
			text += ", deep"
		}
		to.text(label, plain, text, 1)
		label = ""
	}
}

// troubles are what could not be read for this answer, and the newest warnings of the
// log, the newest first.
func (s *sensorStatus) troubles(to *screen, zone *time.Location, most bounds) {
	for _, e := range s.Errors[:min(len(s.Errors), most.warnings)] {
		to.text("error", yellow, e, most.lines)
	}
	label := "log"
	for i := len(s.Warnings) - 1; i >= max(0, len(s.Warnings)-most.warnings); i-- {
		l := s.Warnings[i]
		text := l.Time.In(zone).Format("15:04:05") + " " + l.Level + " " + l.Msg
		for _, more := range []string{l.Code, l.Reason, l.Error} {
			if more != "" && !strings.Contains(text, more) {
				text += ": " + more
			}
		}
		to.text(label, yellow, text, 1)
		label = ""
	}
}

// syscallHook ends the name of the hook that sees only system calls.
const syscallHook = "/sys_exit"

// count is how many events of a kind there were, and were not.
type count struct {
	rate                   float64 // a second
	seen, lost, suppressed uint64
}

func (c count) plus(d count) count {
	return count{c.rate + d.rate, c.seen + d.seen, c.lost + d.lost, c.suppressed + d.suppressed}
}

// counts are by event code.
func (s *sensorStatus) counts() map[string]count {
	kinds := map[string]count{}
	add := func(code string, n count) { kinds[code] = kinds[code].plus(n) }
	for code, n := range s.Sensor.Events {
		add(code, count{seen: n})
	}
	for code, n := range s.Sensor.Lost {
		add(code, count{lost: n})
	}
	for code, n := range s.Sensor.Suppressed {
		add(code, count{suppressed: n})
	}
	if s.Rates != nil {
		for code, r := range s.Rates.Events {
			add(code, count{rate: r})
		}
	}
	return kinds
}

// byFamily puts files into one: their many kinds would fill the screen.
func byFamily(all map[string]count, names []string) (map[string]count, []string) {
	fewer := map[string]count{}
	for _, name := range names {
		to := name
		if strings.HasPrefix(name, "file.") {
			to = "file.*"
		}
		fewer[to] = fewer[to].plus(all[name])
	}
	return fewer, sorted(fewer)
}

func sorted[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

func ago(now, then time.Time) string {
	if then.IsZero() {
		return "an unknown time"
	}
	return span(max(now.Sub(then), 0))
}

// span is a length of time in one or two units.
func span(d time.Duration) string {
	switch {
	case d < 10*time.Second:
		return d.Round(100 * time.Millisecond).String()
	case d < time.Hour:
		return d.Round(time.Second).String()
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh%dm", int(d.Hours()), int(d.Minutes())%60)
	}
	return fmt.Sprintf("%d days", int(d.Hours()/24))
}

func percent(part, whole int64) string {
	if whole <= 0 {
		return "0 %"
	}
	return fmt.Sprintf("%.0f %%", 100*float64(part)/float64(whole))
}

// thousands writes 1234567 as 1,234,567.
func thousands(n uint64) string {
	s := fmt.Sprint(n)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}
