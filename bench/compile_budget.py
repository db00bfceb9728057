"""probe"""
import collections, os, re, subprocess, sys, tempfile, time
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fastrnn.kernels import launch, persistent, stepwise
from fastrnn.kernels.cells import CELLS
from fastrnn.kernels.configs import Config

class Recorder:
    def __init__(self, kernel, calls): self.kernel, self.calls = kernel, calls
    def __getitem__(self, grid):
        return lambda **kw: self.calls.append((self.kernel, grid, kw))

def record(call):
    calls=[]
    saved=[(m,n,getattr(m,n)) for m in (persistent,stepwise) for n in ("forward_kernel","backward_kernel")]
    try:
        for m,n,k in saved: setattr(m,n,Recorder(k,calls))
        call()
    finally:
        for m,n,k in saved: setattr(m,n,k)
    return calls
TY={torch.float32:"*fp32",torch.bfloat16:"*bf16",torch.float16:"*fp16",torch.int32:"*i32"}
def compile_call(kernel, kw, cap):
    params=kernel.params
    sig,const,attrs,opts={}, {}, {}, {}
    for i,p in enumerate(params):
        v=kw[p.name]
        if p.is_constexpr or v is None: sig[p.name]="constexpr"; const[p.name]=v
        elif isinstance(v,tuple):
            sig[p.name]=tuple(TY[t.dtype] for t in v)
            for j in range(len(v)): attrs[(i,j)]=[["tt.divisibility",16]]
        elif isinstance(v,torch.Tensor): sig[p.name]=TY[v.dtype]; attrs[(i,)]=[["tt.divisibility",16]]
        else: sig[p.name]="i32"
    names={p.name for p in params}
    opts={k:v for k,v in kw.items() if k not in names}
    src=ASTSource(fn=kernel,signature=sig,constexprs=const,attrs=attrs)
    opts.update(eval(os.environ.get("OPTS","{}")))
    return triton.compile(src,target=GPUTarget("cuda",cap,32),options=opts)
def report(k):
    tools=os.path.join(os.path.dirname(triton.__file__),"backends/nvidia/bin")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(k.asm["cubin"]); f.flush()
        usage=subprocess.run([f"{tools}/cuobjdump","-res-usage",f.name],capture_output=True,text=True).stdout
        sass=subprocess.run([f"{tools}/cuobjdump","--dump-sass",f.name],capture_output=True,text=True).stdout
    found=re.search(r"REG:(\d+) STACK:(\d+)",usage)
    ops=collections.Counter(o for o in re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_.]+)",sass,re.M))
    short=collections.Counter()
    for o,n in ops.items():
        b=o.split(".")[0]
        if b in("HMMA","HGMMA","LDSM","LDS","STS","BAR","SHFL","FFMA","STL","LDL","ST","LD"): short[b]+=n
        if b in("LDG","STG"): short[o if b=="LDG" else b]+=n
    return int(found[1]),int(found[2]),k.metadata.shared,dict(short), sass
def meta(cell,cfg,T,B,H,D,dtype,which,precision="tf32",save=True):
    c=CELLS[cell]; m=lambda *s,dt=dtype: torch.empty(*s,dtype=dt,device="meta")
    wx=m(D,T,B,c.n_gates*H); r=m(D,c.n_gates*H,H); b=m(D,c.n_gates*H); st=[m(D,B,H) for _ in range(c.n_states)]
    if which=="f": return record(lambda: launch.forward(c,wx,r,b,st,cfg,precision,traced=save,save=save))[0]
    y=m(T,B,D*H); tr=[m(T,B,D*H,dt=torch.float32) for _ in st[1:]]
    return record(lambda: launch.backward(c,y,st,r,st,y,tr,m(D,T,B,c.n_saved*H),cfg,precision))[0]
if __name__=="__main__":
    cell,which,proto,H,BB,BH,BK,W=sys.argv[1:9]; dtype={"bf16":torch.bfloat16,"fp32":torch.float32,"fp16":torch.float16}[sys.argv[9]]; prec=sys.argv[10] if len(sys.argv)>10 else "tf32"
    cap=int(sys.argv[11]) if len(sys.argv)>11 else 90
    cfg=Config("resident" if proto=="local" else "stepwise" if proto=="step" else "persistent","local" if proto=="step" else proto,int(BB),int(BH),int(BK),int(W))
    t=time.time(); k,g,kw=meta(cell,cfg,100,int(BB),int(H),1,dtype,which,prec)
    r=compile_call(k,kw,cap); R=report(r); print(" ".join(sys.argv[1:]), "|", *R[:4], "%.1fs"%(time.time()-t))
    open("/tmp/w/last.sass","w").write(R[4]); open("/tmp/w/last.ttgir","w").write(r.asm["ttgir"])
