// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"html"
	"math"
	"strings"
)

// panel is one chart: a bar per store.
type panel struct {
	title string
	bars  []bar
}

type bar struct {
	label string
	value float64
	own   bool // ours
	floor bool // not a queue
}

// panels chooses what the picture shows.
func panels(samples []sample) []panel {
	r := results(samples)
	of := func(title, cell string, value func(result) float64) panel {
		p := panel{title: title}
		for _, c := range cells() {
			if c.name != cell {
				continue
			}
			for _, s := range c.stores {
				v := r.median(cell, s, value)
				if s != "adaptive" && !math.IsNaN(v) {
					p.bars = append(p.bars, bar{label(s), v, s == ours, s == raw || s == "ring"})
				}
			}
		}
		return p
	}
	product := "append " + shapes[len(shapes)-1].name
	return []panel{
		of("durable appends of OCSF events, MB/s: more is better", product, speed),
		of("drain from a cold cache, MB/s: more is better", "drain cold", speed),
		of("bytes written per payload byte: less is better", product, written),
		of("CPU, µs per event appended: less is better", product, cpu),
	}
}

const (
	barHeight  = 18
	barStep    = 24
	labelWidth = 170
	barWidth   = 400
	svgWidth   = labelWidth + barWidth + 90
)

// picture draws the panels below each other, for a light and a dark page alike.
func picture(ps []panel) string {
	var b strings.Builder
	y := 12
	for _, p := range ps {
		y += 22
		fmt.Fprintf(&b, "<text x=\"8\" y=\"%d\" class=\"t\">%s</text>\n", y, html.EscapeString(p.title))
		y += 10
		top := 0.0
		for _, x := range p.bars {
			top = max(top, x.value)
		}
		for _, x := range p.bars {
			class := "peer"
			if x.own {
				class = "own"
			} else if x.floor {
				class = "floor"
			}
			w := max(1, int(x.value/top*barWidth))
			fmt.Fprintf(&b, "<text x=\"%d\" y=\"%d\" class=\"l\">%s</text>", labelWidth-8, y+13, html.EscapeString(x.label))
			fmt.Fprintf(&b, "<rect x=\"%d\" y=\"%d\" width=\"%d\" height=\"%d\" class=\"%s\"/>", labelWidth, y, w, barHeight, class)
			fmt.Fprintf(&b, "<text x=\"%d\" y=\"%d\">%s</text>\n", labelWidth+w+6, y+13, number(x.value))
			y += barStep
		}
		y += 8
	}
	return fmt.Sprintf(`<svg xmlns="http://www.w3.org/2000/svg" width="%[1]d" height="%[2]d" viewBox="0 0 %[1]d %[2]d" font-family="sans-serif" font-size="12">
<style>text{fill:#333}.t{font-weight:bold;font-size:13px}.l{text-anchor:end}.own{fill:#1f6feb}.peer{fill:#9aa4b2}.floor{fill:#d0d7de}</style>
<rect width="100%%" height="100%%" fill="#fff"/>
%[3]s</svg>
`, svgWidth, y, b.String())
}
