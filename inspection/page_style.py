"""The look of the doctor's page, light and dark."""

STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1d2125; --quiet: #68717a; --line: #dfe3e6; --head: #f5f6f7;
  --good: #2e8b57; --text-tokens: #6b7f99; --image-tokens: #3f7fd1; --video-tokens: #c9822b; --audio-tokens: #8a5bc7; }
@media (prefers-color-scheme: dark) {
  :root { --back: #15181b; --text: #dfe3e6; --quiet: #939ca5; --line: #30363b; --head: #1d2125;
    --good: #5fbf8a; --text-tokens: #8b9db5; --image-tokens: #6ba3ea; --video-tokens: #e0a354; --audio-tokens: #b08be0; }
}
* { box-sizing: border-box; }
body { max-width: 76rem; margin: 0 auto; padding: 1.5rem; background: var(--back); color: var(--text);
  font: 15px/1.45 system-ui, sans-serif; }
h1 { margin: 0 0 .4rem; font-size: 1.3rem; font-weight: 600; }
h2 { margin: 2.2rem 0 .6rem; padding-top: .8rem; border-top: 1px solid var(--line); font-size: 1.05rem; font-weight: 600; }
h2 b { margin-left: .35rem; color: var(--quiet); font-weight: 400; }
h2 small { margin-left: .8rem; }
h3 { margin: 0 0 .2rem; font-size: .85rem; font-weight: 400; color: var(--quiet); }
p { margin: .3rem 0 .6rem; }
.lead { font-size: 1.05rem; }
small { color: var(--quiet); font-size: .8rem; font-weight: 400; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
nav { display: flex; flex-wrap: wrap; gap: .4rem; margin: .6rem 0 1rem; }
nav a { padding: .15rem .6rem; border: 1px solid var(--line); border-radius: 1rem; color: inherit; text-decoration: none;
  font-size: .85rem; background: var(--head); }
table { border-collapse: collapse; margin: .4rem 0; }
th, td { padding: .25rem .9rem .25rem 0; text-align: left; vertical-align: middle; font-weight: 400; overflow-wrap: anywhere; }
th { color: var(--quiet); font-size: .82rem; border-bottom: 1px solid var(--line); }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
pre { overflow: auto; margin: 0; padding: .8rem 1rem; border-radius: 6px; background: var(--head); border: 1px solid var(--line);
  font-size: .82rem; line-height: 1.5; white-space: pre-wrap; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(23rem, 1fr)); gap: .7rem; }
.card { display: flex; gap: .8rem; padding: .6rem; border: 1px solid var(--line); border-radius: 6px; min-width: 0; }
.card > div:last-child { min-width: 0; overflow-wrap: anywhere; font-size: .88rem; }
.card b { font-weight: 600; }
.pair { flex-direction: column; gap: .4rem; }
.media { display: flex; flex: none; flex-wrap: wrap; gap: .3rem; max-width: 270px; align-items: flex-start; }
.media img { display: block; max-width: 100%; min-width: 48px; border-radius: 3px; background: var(--head);
  border: 1px solid var(--line); }
.strip { display: flex; gap: 2px; }
.strip img { width: 42px; min-width: 0; }
.sound { width: 128px; height: 48px; flex: none; border-radius: 3px; background: var(--head); border: 1px solid var(--line); }
.share { width: 9rem; height: 8px; background: var(--head); border-radius: 2px; vertical-align: middle; }
.legend span { margin-right: 1rem; font-size: .85rem; }
.legend i { display: inline-block; width: .7rem; height: .7rem; margin-right: .3rem; border-radius: 2px; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(28rem, 1fr)); gap: 1rem 2rem; margin-top: .8rem; }
figure { margin: 0; min-width: 0; }
figure svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--quiet); font: 11px system-ui, sans-serif; }
"""
